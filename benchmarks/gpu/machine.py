"""What the report runs on."""

from __future__ import annotations

import multiprocessing
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks.kernels.measure import device_name, name_and_message, versions
from fedra_engine.runtime.errors import InputError
from fedra_kernels import dispatch

_SECONDS = 60.0
"""What a first contact with the GPU may take."""


@dataclass(frozen=True)
class Machine:
    """The device, what the configuration tables call it, and the versions that decide about speed."""

    device: str
    architecture: str
    versions: str


def find_machine(device: str) -> Machine:
    """Ask the device in a process of its own: stages cannot be forked from one that has used a GPU.

    Raises:
        InputError: there is no GPU, and `device` is one.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_look, args=(device, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        answer: Any = ours.recv() if ours.poll(_SECONDS) else f"gave no answer for {_SECONDS:.0f} s"
    except EOFError:
        answer = "ended the process that looked at it"
    process.kill()
    process.join()
    if isinstance(answer, str):
        raise InputError(f"device: {answer}; --rehearse runs the same stages without one")
    return Machine(**answer)


def _look(name: str, answer: Connection) -> None:
    if name == "cuda" and not torch.cuda.is_available():
        answer.send("found no GPU, expected one")
        return
    device = torch.device(name)
    try:
        torch.zeros(1, device=device).item()
    except RuntimeError as error:
        answer.send(f"found a GPU that cannot be used, {name_and_message(error)}")
        return
    answer.send(asdict(Machine(device_name(device), dispatch.architecture(device), versions())))
