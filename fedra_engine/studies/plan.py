"""What studies are made of: experiments, each with a folder and a lock of its own.

Nothing here imports torch, so that `--help` and a mistyped option answer at once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fedra_engine.config import ExperimentConfig
from fedra_engine.runtime.errors import InputError


@dataclass(frozen=True)
class Part:
    """An experiment of a study; `config.name` is the name of its folder."""

    config: ExperimentConfig

    @property
    def path(self) -> Path:
        """The experiment's folder."""
        assert self.config.name is not None
        return Path(self.config.output_dir) / self.config.name

    @property
    def lock_file(self) -> Path:
        """Held by the process that is at work on it. Beside the folder, which may be made and removed."""
        return self.path.with_name(f".{self.path.name}.lock")


@dataclass(frozen=True)
class PlannedRun(Part):
    """A run that a comparison needs; `label` is its method's, as tables have it."""

    label: str

    @property
    def title(self) -> str:
        """How messages call it."""
        return f"{self.label} seed {self.config.seed}"


class Comparison(NamedTuple):
    """The runs, their folder, and how many of them go on at a time, with `oversubscribe` more than there are cores."""

    runs: tuple[PlannedRun, ...]
    output_dir: Path
    jobs: int
    oversubscribe: bool


@dataclass(frozen=True)
class Point(Part):
    """Rounds of `clients` clients to measure for `seconds` seconds, on `processes` processes of `threads` threads."""

    clients: int
    processes: int
    threads: int
    seconds: float

    @property
    def title(self) -> str:
        """How messages call it."""
        return f"{self.clients:,} clients, {processes_text(self.processes)}"


class Network(NamedTuple):
    """What a message between two processes takes: `latency` seconds, and its bytes over `bandwidth` (bytes/s)."""

    latency: float
    bandwidth: float


class Scaling(NamedTuple):
    """The points, few processes and few clients first; their folder; what times are computed for; and sharing cores."""

    points: tuple[Point, ...]
    output_dir: Path
    projected: tuple[int, ...]
    network: Network
    oversubscribe: bool


def processes_text(number: int) -> str:
    """`1 process`, `2 processes`."""
    return f"{number} process{'es' if number > 1 else ''}"


def differences(
    found: Any, expected: Any, irrelevant: Collection[str], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Dotted names of the fields in which two configurations differ, with both values; but for irrelevant ones."""
    for field in fields(found):
        name, one, other = f"{prefix}{field.name}", getattr(found, field.name), getattr(expected, field.name)
        if name in irrelevant:
            continue
        if is_dataclass(one):
            yield from differences(one, other, irrelevant, f"{name}.")
        elif one != other:
            yield name, one, other


def refuse_changes(changes: Iterable[tuple[str, object, object]], where: Path) -> None:
    """Raises InputError for the first of `changes`: a field's name, its value in `where`, and that now."""
    for field, found, expected in changes:
        raise InputError(
            f"{field}: found {found} in {where}, expected {expected} as this command has it (or another output_dir)"
        )
