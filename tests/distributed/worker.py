"""What the processes of a test job do: run, or go on with, one experiment after another."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

from fedra_engine import experiment, inputs
from fedra_engine import run as run_module
from fedra_engine.callbacks import partition_report
from fedra_engine.callbacks.run_folder import RunFolder
from fedra_engine.config import ExperimentConfig
from fedra_engine.config.parsing import read_config
from fedra_engine.data.samples import ImageSamples
from fedra_engine.execution.scheduling import Pace
from fedra_engine.execution.sweep import SweepExecutor
from fedra_engine.federation.work import LocalWork
from fedra_engine.report import writer
from fedra_engine.runtime.errors import InputError
from fedra_engine.runtime.exit_codes import end, exit_code
from fedra_engine.runtime.processes import Processes, join_job
from tests.running import spoil


def main() -> None:
    """`worker.py <folder>`: run the cases `<folder>/<name>/config.yaml` in `<folder>/<name>/run`.

    Leaves `clients.<process>.json`, who was trained in each round, and `error.<process>` where there was one.
    """
    leave_out_what_takes_long(setattr)
    accelerator = join_job()
    for file in sorted(Path(sys.argv[1]).glob("*/config.yaml"), key=lambda file: (file.parent.name == "killed", file)):
        for _ in range(2 if file.parent.name == "interrupted" else 1):
            run_case(file.parent, read_config(file), accelerator)


def run_case(folder: Path, config: ExperimentConfig, accelerator: Accelerator) -> None:
    """Run the experiment, or go on with it where there is a run already."""
    processes = Processes.of(accelerator)
    earlier = RunFolder(folder / "run") if (folder / "run").exists() else None
    # Nobody looks before all have looked.
    processes.all_gather_object(None)
    fault = FAULTS.get(folder.name) if processes.index == 1 and earlier is None else None
    trained = observe_training(fault)
    let_clients_change_hands()
    batch = ImageSamples.batch
    spoil(setattr, SPOILT.get(folder.name, ()), rounds=(1,))
    try:
        with (
            bad_data(*LACKING[folder.name]) if folder.name in LACKING and processes.index == 1 else nullcontext(),
            other_model() if folder.name == "differing" and processes.index == 1 else nullcontext(),
        ):
            run_module.run(config, earlier, accelerator=accelerator)
    except InputError as error:
        (folder / f"error.{processes.index}").write_text(str(error))
    ImageSamples.batch = batch  # type: ignore[method-assign]
    (folder / f"clients.{processes.index}.json").write_text(json.dumps(trained))


def leave_out_what_takes_long(replace: Callable[[object, str, object], None]) -> None:
    """No plots of the partition and no reports, and the same images decoded once for all runs.

    By `replace`, which is `setattr`.
    """
    replace(inputs, "load_source", _once(inputs.load_source))
    replace(experiment, "prepare", _once(experiment.prepare))
    replace(partition_report, "plot_partition", lambda *_: None)
    replace(writer, "write_report", lambda *_: None)


def _once(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with arguments that are the same in every call."""
    results: list[Any] = []

    def first_result(*arguments: Any, **options: Any) -> Any:
        if not results:
            results.append(function(*arguments, **options))
        return results[0]

    return first_result


_train = SweepExecutor.train


def find_bad_input() -> None:
    """As an executor may."""
    raise InputError("found by process 1")


def die() -> None:
    """As when the system runs out of memory."""
    os.kill(os.getpid(), signal.SIGKILL)


FAULTS = {"failing": find_bad_input, "interrupted": find_bad_input, "killed": die}
"""Cases in which something happens to process 1 in the second round, after it has trained a part of its share."""


SPOILT = {"spoilt": (0, 1, 4), "all spoilt": tuple(range(6))}
"""Cases in which updates of these clients are not finite in the second round."""

LACKING = {
    "sourceless": (inputs, "load_source"),
    "clientless": (experiment, "make_clients"),
    "headless": (experiment, "initial_heads"),
}
"""Cases in which process 1 has other data than the others, and what then fails there."""


@contextmanager
def bad_data(module: Any, step: str) -> Iterator[None]:
    """As on a machine that does not have the data, or not all of them."""
    found = getattr(module, step)

    def fail(*_: object, **__: object) -> None:
        raise InputError(f"{step} failed on process 1")

    setattr(module, step, fail)
    try:
        yield
    finally:
        setattr(module, step, found)


@contextmanager
def other_model() -> Iterator[None]:
    """As on a machine whose copy of the model has other weights."""
    found = run_module.fingerprint
    run_module.fingerprint = lambda experiment: {**found(experiment), "model": "another"}
    try:
        yield
    finally:
        run_module.fingerprint = found


def observe_training(fault: Callable[[], None] | None) -> list[list[int]]:
    """A list that will hold the clients this process trains in each round."""
    trained: list[list[int]] = []

    def train(self: SweepExecutor, work: LocalWork, *arguments: Any) -> Iterator[Any]:
        trained.append(work.participants.tolist())
        for updates in _train(self, work, *arguments):
            yield updates
            if fault is not None and work.round == 1:
                fault()

    SweepExecutor.train = train  # type: ignore[method-assign]
    return trained


def let_clients_change_hands() -> None:
    """In every other round the first process counts as the slower one."""
    paces = cycle([np.array([1.0, 1.5]), np.array([1.5, 1.0])])
    Pace.seconds_per_cost = lambda self: next(paces)  # type: ignore[method-assign]


if __name__ == "__main__":
    end(exit_code(main))
