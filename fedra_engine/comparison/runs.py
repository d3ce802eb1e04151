"""Execute planned runs: begin, go on with, or find them finished. Several processes may share an output folder."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Literal

from accelerate import Accelerator
from filelock import FileLock, Timeout

from fedra_engine.callbacks.run_folder import RunFolder
from fedra_engine.commands.parsing import read_config
from fedra_engine.commands.run_request import RunRequest
from fedra_engine.comparison.accounting import RunCosts, count_costs
from fedra_engine.comparison.plan import PlannedRun
from fedra_engine.config.differences import RESULT_NEUTRAL, differences
from fedra_engine.methods.registry import method_named
from fedra_engine.run import run as train_run
from fedra_engine.runtime.errors import InputError
from fedra_engine.runtime.files import write_whole
from fedra_engine.runtime.tables import PlainConsole


@dataclass(frozen=True)
class Outcome:
    """How the execution of a run ended.

    Attributes:
        run: which.
        state: it is `done` (now or before), `busy` (another process is executing it), or `failed`.
        note: more about it, for people.
    """

    run: PlannedRun
    state: Literal["done", "busy", "failed"]
    note: str


@dataclass(frozen=True)
class RunResult:
    """What is compared of a finished run.

    Attributes:
        label: of its method.
        seed: of its draws.
        rounds: trained rounds.
        seconds: wall-clock time of these rounds, without evaluations.
        accuracy: top-1 (0…1) of each domain, after the last round.
        frozen: the same before the first round.
        curve: average over the domains by number of rounds, wherever it was evaluated.
        costs: what was counted.
        caution: what to know of the method in this setting, if anything.
    """

    label: str
    seed: int
    rounds: int
    seconds: float
    accuracy: dict[str, float]
    frozen: dict[str, float]
    curve: dict[int, float]
    costs: RunCosts
    caution: str | None = None


def check_runs(runs: Sequence[PlannedRun]) -> None:
    """Find out before the first run what would be in the way of a later one.

    Raises:
        InputError: there is no such method, or a run's folder belongs to something else.
    """
    for run in runs:
        method_named(run.config.method.name)
        earlier_run(run)


def earlier_run(run: PlannedRun) -> RunFolder | None:
    """The folder of `run`; None if it has not begun.

    Raises:
        InputError: the folder belongs to a run with other settings, or to something else.
    """
    folder = RunFolder(run.path)
    if run.lock_file.is_dir():
        raise InputError(f"{run.lock_file}: found a folder, expected a file or nothing")
    if not folder.config_file.is_file():
        if os.path.lexists(run.path):
            raise InputError(f"{run.path}: found something that is no run, expected another output_dir")
        return None
    before = read_config(folder.config_file)
    for field, found, expected in differences(before, run.config, RESULT_NEUTRAL):
        raise InputError(
            f"{field}: found {found} in {folder.config_file}, expected {expected} as this command has it (or another "
            "output_dir)"
        )
    return folder


def execute(run: PlannedRun) -> Outcome:
    """Bring a run to its end, unless another process is doing so. A run that cannot be is `failed`."""
    try:
        with FileLock(run.lock_file, timeout=0):
            before = _finish(run)
        result = read_result(run)
    except Timeout:
        return Outcome(run, "busy", "another process is executing it")
    except InputError as error:
        return Outcome(run, "failed", str(error))
    accuracy = f"{100 * mean(result.accuracy.values()):.1f} % after {result.rounds} rounds, {result.seconds:.0f} s"
    caution = f"; note: {result.caution}" if result.caution else ""
    return Outcome(run, "done", f"{accuracy}{before}{caution}")


def read_result(run: PlannedRun) -> RunResult:
    """Read what a finished run left in its folder.

    Raises:
        InputError: a file is missing or damaged.
    """
    folder = RunFolder.open(run.path)
    with _reading(folder.summary_file):
        summary = json.loads(folder.summary_file.read_text())
        rounds, frozen_average, caution = summary["rounds"], float(summary["average_frozen"]), summary.get("caution")
        accuracy, frozen = _accuracy(summary["tuned"]), _accuracy(summary["frozen"])
        if type(rounds) is not int or not isinstance(caution, str | None) or list(accuracy) != list(frozen):
            raise TypeError
    with _reading(folder.metrics_file):
        records = folder.read_metrics()
        if [record["round"] for record in records] != list(range(rounds)):
            raise ValueError
        evaluated = {
            record["round"] + 1: mean(_accuracy(record["accuracy"]).values())
            for record in records
            if "accuracy" in record
        }
        seconds = sum(_amount(record["seconds"]) for record in records)
        kept = folder.kept_metrics_file
        if kept.is_file() and kept.read_bytes() != folder.metrics_file.read_bytes():
            raise InputError(f"{folder.metrics_file}: found other records than in {kept}, expected the same in both")
    with _reading(folder.summary_file):
        if _accuracy(records[-1]["accuracy"]) != accuracy or not math.isclose(frozen_average, mean(frozen.values())):
            raise ValueError
    with _reading(_costs_file(run)):
        costs = RunCosts(**{name: _amount(value) for name, value in json.loads(_costs_file(run).read_text()).items()})
    return RunResult(
        label=run.label,
        seed=run.config.seed,
        rounds=rounds,
        seconds=seconds,
        accuracy=accuracy,
        frozen=frozen,
        curve={0: frozen_average, **evaluated},
        costs=costs,
        caution=caution,
    )


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Name `file` in an InputError where something in it is not as a run wrote it."""
    try:
        yield
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{file}: cannot read it: {error.strerror}; expected the file of a finished run") from error
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RecursionError) as error:
        raise InputError(f"{file}: found something else than a run wrote, expected the file as it was") from error


def _accuracy(values: dict[str, float]) -> dict[str, float]:
    """`values` by domain, checked to be from 0 to 1."""
    checked = {str(domain): float(value) for domain, value in values.items()}
    if not checked or not all(0 <= value <= 1 for value in checked.values()):
        raise ValueError
    return checked


def _amount(value: float) -> float:
    """`value`, checked to be what can be counted or timed."""
    if type(value) not in (int, float) or not 0 <= value < math.inf:
        raise ValueError
    return float(value)


def _finish(run: PlannedRun) -> str:
    """Train and count what is missing. Returns what was there before, in words."""
    earlier = earlier_run(run)
    finished = earlier is not None and earlier.summary_file.is_file()
    if not finished:
        request = RunRequest(run.config, earlier)
        # A run's output goes to its log only; many of them would drown the comparison.
        console = PlainConsole(quiet=True, force_terminal=False)
        train_run(request.config, request.resumed, accelerator=Accelerator(), console=console)
    if not _costs_file(run).is_file():
        costs = asdict(count_costs(run.config))
        write_whole(_costs_file(run), json.dumps(costs, indent=2) + "\n")
    if finished:
        return " (finished before)"
    return "" if earlier is None else " (interrupted before, went on)"


def _costs_file(run: PlannedRun) -> Path:
    return run.path / "costs.json"
