"""What a contestant's process is asked to run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.peers.work import State, Work

Loop = Callable[[Callable[[], State]], None]
"""Takes a function that runs one round from the initial state, and returns when no more rounds are asked for."""
HANDWRITTEN = "handwritten"
"""An executor that is not the engine's: the loop of `benchmarks/handwritten.py`."""


@dataclass(frozen=True)
class Job:
    """One contestant in one scene.

    Attributes:
        scene: of `SCENES`.
        folder: has the scene's model and its work.
        dtype, attention, executor: of the engine's options; the executor, or `HANDWRITTEN`, is for the engine alone.
        threads: of the process.
        idle: whether clients take no steps, so that what is left is the framework's own work.
    """

    scene: str
    folder: str
    dtype: str
    attention: str
    executor: str
    threads: int
    idle: bool

    @property
    def precision(self) -> torch.dtype:
        """The dtype as torch's."""
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    def work(self) -> Work:
        """The round as all contestants get it."""
        return Work.load(work_file(Path(self.folder)))


def work_file(folder: Path) -> Path:
    """Where a scene's work lies in its folder."""
    return folder / "work.pt"
