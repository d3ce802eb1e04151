"""Execute planned runs: begin, go on with, or find them finished. Several processes may share an output folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Literal

from accelerate import Accelerator
from filelock import FileLock, Timeout
from rich.console import Console

from fedra_engine.cli import read_config
from fedra_engine.comparison.accounting import RunCosts, count_costs
from fedra_engine.comparison.plan import PlannedRun
from fedra_engine.config_comparison import RESULT_NEUTRAL, differences
from fedra_engine.errors import InputError
from fedra_engine.files import write_whole
from fedra_engine.methods.registry import METHODS
from fedra_engine.reporting.console import Reporter
from fedra_engine.reporting.run_folder import RunFolder
from fedra_engine.run_request import RunRequest
from fedra_engine.simulation import Simulation


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
        InputError: there is no such method, or a run's folder belongs to a run with other settings.
    """
    for run in runs:
        if run.config.method.name not in METHODS:
            raise InputError(f"methods: found {run.config.method.name!r}, expected some of {', '.join(METHODS)}")
        earlier_run(run)


def earlier_run(run: PlannedRun) -> RunFolder | None:
    """The folder of `run`; None if it has not begun.

    Raises:
        InputError: the folder belongs to a run with other settings.
    """
    folder = RunFolder(run.path)
    if not folder.config_file.is_file():
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
    except Timeout:
        return Outcome(run, "busy", "another process is executing it")
    except InputError as error:
        return Outcome(run, "failed", str(error))
    result = read_result(run)
    accuracy = f"{100 * mean(result.accuracy.values()):.1f} % after {result.rounds} rounds, {result.seconds:.0f} s"
    caution = f"; note: {result.caution}" if result.caution else ""
    return Outcome(run, "done", f"{accuracy}{before}{caution}")


def read_result(run: PlannedRun) -> RunResult:
    """Read what a finished run left in its folder."""
    folder = RunFolder.open(run.path)
    summary, records = json.loads(folder.summary_file.read_text()), folder.read_metrics()
    evaluated = {record["round"] + 1: mean(record["accuracy"].values()) for record in records if "accuracy" in record}
    return RunResult(
        label=run.label,
        seed=run.config.seed,
        rounds=summary["rounds"],
        seconds=sum(record["seconds"] for record in records),
        accuracy=summary["tuned"],
        frozen=summary["frozen"],
        curve={0: summary["average_frozen"], **evaluated},
        costs=RunCosts(**json.loads(_costs_file(run).read_text())),
        caution=summary.get("caution"),
    )


def _finish(run: PlannedRun) -> str:
    """Train and count what is missing. Returns what was there before, in words."""
    earlier = earlier_run(run)
    finished = earlier is not None and earlier.summary_file.is_file()
    if not finished:
        _remove_unbegun(run.path)
        request = RunRequest(run.config, earlier)
        # A run's output goes to its log only; many of them would drown the comparison.
        console = Console(quiet=True, force_terminal=False)
        with request.open_folder() as folder, Reporter(folder.log_file, console) as reporter:
            Simulation(run.config, folder, reporter, Accelerator()).run()
    if not _costs_file(run).is_file():
        costs = asdict(count_costs(run.config))
        write_whole(_costs_file(run), json.dumps(costs, indent=2) + "\n")
    if finished:
        return " (finished before)"
    return "" if earlier is None else " (interrupted before, went on)"


def _remove_unbegun(path: Path) -> None:
    """Remove a folder if a process has made it, but came to its end before the configuration was in it."""
    if path.is_dir() and all(entry.name.startswith(".") for entry in path.iterdir()):
        shutil.rmtree(path)


def _costs_file(run: PlannedRun) -> Path:
    return run.path / "costs.json"
