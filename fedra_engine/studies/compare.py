"""Compare methods: begin their runs with every seed, go on with them, or find them finished.

Several processes may share an output folder.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

import torch
from accelerate import Accelerator
from filelock import FileLock, Timeout
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from fedra_engine.callbacks.run_folder import RunFolder, make_folder
from fedra_engine.commands.parsing import read_config
from fedra_engine.config import ExperimentConfig
from fedra_engine.config.differences import RESULT_NEUTRAL, differences
from fedra_engine.costs.memory_model import CostModel
from fedra_engine.experiment import build_experiment
from fedra_engine.methods.registry import method_named
from fedra_engine.run import run as train_run
from fedra_engine.runtime.errors import InputError, printable
from fedra_engine.runtime.exit_codes import unwound_by_signals
from fedra_engine.runtime.files import write_whole
from fedra_engine.runtime.processes import check_cores
from fedra_engine.runtime.tables import PlainConsole
from fedra_engine.studies.plan import Comparison, PlannedRun, refuse_changes
from fedra_engine.studies.report import show_table
from fedra_engine.studies.results import REPORT, RunCosts, costs_file, read_result, write_report
from fedra_engine.studies.workers import work_off

_SECONDS_BETWEEN_LOOKS = 1.0
"""At what runs have written."""
_SECONDS_BETWEEN_LINES = 10.0
"""Of one run, where there is no terminal with bars."""


class Outcome(NamedTuple):
    """How a run ended: `done` (now or before), `busy` (another process is executing it) or `failed`; with a note."""

    run: PlannedRun
    state: Literal["done", "busy", "failed"]
    note: str


def compare(comparison: Comparison, command: str) -> None:
    """Execute what is missing of the runs, show how far they are, and report on all of them.

    Args:
        comparison: the runs.
        command: that asked for them.

    Raises:
        InputError: something is in the way of a run; or, after all others and the report, runs failed.
        ProcessLostError: one of the processes was killed.
    """
    runs, folder = comparison.runs, comparison.output_dir
    if not comparison.oversubscribe:
        # There are never more processes than runs.
        check_cores("jobs", min(comparison.jobs, len(runs)), advice=" (--oversubscribe true lets runs share cores)")
    check_runs(runs)
    REPORT.check(folder)
    make_folder(folder)
    console = PlainConsole()
    console.print(f"{len(runs)} runs in {folder}; each writes its progress to its run.log", soft_wrap=True)
    reported = 0

    def report(outcome: Outcome) -> None:
        nonlocal reported
        if outcome.state != "busy":
            reported += 1
            progress.remove(outcome.run)
        counter = f"{reported:>{len(str(len(runs)))}}/{len(runs)}"
        console.print(f"{counter}  {outcome.run.title}: {outcome.note}", soft_wrap=True)

    with ProgressDisplay(console, runs) as progress:
        outcomes = execute_all(runs, comparison.jobs, report)
    _conclude(outcomes, folder, command, console)


def _conclude(outcomes: Sequence[Outcome], folder: Path, command: str, console: PlainConsole) -> None:
    """Report on the runs that are done. Raises InputError if there are none, or others failed."""
    results = [read_result(outcome.run) for outcome in outcomes if outcome.state == "done"]
    if results:
        missing = {outcome.run.title: outcome.note for outcome in outcomes if outcome.state != "done"}
        rows = write_report(folder, command, results, missing)
        show_table(console, rows, f"comparison.md, .csv and .tex and accuracy_by_round.png are in {folder}")
    else:
        REPORT.remove(folder)
    failed = [outcome.run.title for outcome in outcomes if outcome.state == "failed"]
    if failed:
        raise InputError(
            f"methods: found {len(failed)} of {len(outcomes)} runs that failed ({', '.join(failed)}), expected all to "
            "finish (the reasons are above)"
        )
    if not results:
        raise InputError(
            f"methods: found all {len(outcomes)} runs being executed by other processes, expected one that is "
            "finished (there is no table; run the command again later)"
        )


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
    changes = differences(read_config(folder.config_file), run.config, RESULT_NEUTRAL)
    refuse_changes(changes, folder.config_file)
    return folder


def execute_all(runs: Sequence[PlannedRun], jobs: int, report: Callable[[Outcome], None]) -> list[Outcome]:
    """Execute `runs`, `jobs` at a time; those that another process was executing are looked after again at the end.

    An interrupt, or an error other than bad input, stops all of them; each goes on from its last round when asked for
    again. `report` is called with every outcome as soon as it is known.

    Returns:
        The last outcome of each run, in their order.

    Raises:
        ProcessLostError: one of the processes was killed.
    """
    outcomes: dict[str, Outcome] = {}

    def keep(outcome: Outcome) -> None:
        outcomes[outcome.run.title] = outcome
        report(outcome)

    with unwound_by_signals():
        try:
            work_off(runs, jobs, execute, keep)
            work_off([run for run in runs if outcomes[run.title].state == "busy"], jobs, execute, keep)
        except (KeyboardInterrupt, OSError) as error:
            error.add_note("the same command goes on")
            raise
    return [outcomes[run.title] for run in runs]


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


def _finish(run: PlannedRun) -> str:
    """Train and count what is missing. Returns what was there before, in words."""
    earlier = earlier_run(run)
    finished = earlier is not None and earlier.summary_file.is_file()
    if not finished:
        # A run's output goes to its log only; many of them would drown the comparison.
        console = PlainConsole(quiet=True, force_terminal=False)
        train_run(run.config, earlier, accelerator=Accelerator(), console=console)
    if not costs_file(run).is_file():
        write_whole(costs_file(run), json.dumps(asdict(count_costs(run.config)), indent=2) + "\n")
    if finished:
        return " (finished before)"
    return "" if earlier is None else " (interrupted before, went on)"


@dataclass
class _Watched:
    """A run, how many bytes its records had when they were last read, and when a line about it was last printed."""

    run: PlannedRun
    size: int
    said: float
    bar: TaskID | None = None


class ProgressDisplay:
    """Shows how far runs are that go on: as bars on a terminal, elsewhere as lines.

    A context manager; in a thread, it looks for new rounds in what the runs leave in their folders.
    """

    def __init__(self, console: PlainConsole, runs: Iterable[PlannedRun]) -> None:
        """Show `runs` on `console`."""
        self._console = console
        name, text = (TextColumn(f"{{task.{of}}}", markup=False) for of in ("description", "fields[text]"))
        # Drawing takes time of the processor that trains.
        self._bars = Progress(
            *(name, BarColumn(), MofNCompleteColumn(), text),
            console=console,
            refresh_per_second=2,
            transient=True,
            disable=not console.is_interactive,
        )
        now = time.monotonic()
        self._watched = {run.title: _Watched(run, _size_of_records(run), now) for run in runs}
        self._changing = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._bars.start()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        self._bars.stop()

    def remove(self, run: PlannedRun) -> None:
        """The run goes on no longer."""
        with self._changing:
            watched = self._watched.pop(run.title, None)
            if watched is not None and watched.bar is not None:
                self._bars.remove_task(watched.bar)

    def look(self) -> None:
        """Show the runs that have finished rounds since the last look."""
        with self._changing:
            for watched in self._watched.values():
                size = _size_of_records(watched.run)
                # What is wrong with records is said when the run has ended.
                with suppress(InputError, LookupError, TypeError):
                    if size not in (0, watched.size):
                        self._show(watched, RunFolder(watched.run.path).read_metrics())
                        watched.size = size

    def _watch(self) -> None:
        while not self._over.wait(_SECONDS_BETWEEN_LOOKS):
            self.look()

    def _show(self, watched: _Watched, records: Sequence[Mapping[str, Any]]) -> None:
        done, rounds, now = records[-1]["round"] + 1, watched.run.config.rounds, time.monotonic()
        losses = [f"loss {record['loss']:.4f}" for record in records if record["loss"] is not None]
        accuracies = [100 * mean(record["accuracy"].values()) for record in records if "accuracy" in record]
        text = ", ".join([*losses[-1:], *(f"accuracy {accuracy:.1f} %" for accuracy in accuracies[-1:])])
        if watched.bar is None:
            watched.bar = self._bars.add_task(printable(watched.run.title), total=rounds, text=text)
        self._bars.update(watched.bar, completed=done, text=text)
        if self._bars.disable and now - watched.said >= _SECONDS_BETWEEN_LINES:
            watched.said = now
            self._console.print(f"{watched.run.title}: round {done} of {rounds}, {text}", soft_wrap=True)


def _size_of_records(run: PlannedRun) -> int:
    try:
        return RunFolder(run.path).metrics_file.stat().st_size
    except OSError:
        return 0


def count_costs(config: ExperimentConfig) -> RunCosts:
    """Count what a whole run costs; `costs/counting.py` has the formulas.

    The participants, assignments and devices of all rounds are drawn again from the seed; nothing is trained. A
    participant whose update does not arrive is not counted. Methods whose assignment depends on earlier rounds are
    counted as if they had the initial state in every round.

    Raises:
        InputError: something in the configuration cannot be used.
    """
    experiment = build_experiment(config, torch.device("cpu"))
    model = CostModel(experiment.foundation, experiment.train_samples, config.lora, config.training)
    trainable, uploaded, participations, flops = 0.0, 0.0, 0, 0.0
    for round in range(config.rounds):
        work, assignment, _ = experiment.round_work(round)
        costs = model.count(experiment.clients, work.participants, assignment, experiment.method)
        participations += len(work.participants)
        trainable += float(costs.trained.sum())
        uploaded += float(costs.uploaded.sum())
        flops += float(costs.flops.sum())
    times = max(participations, 1)
    return RunCosts(trainable / times, uploaded / times, flops)
