"""Compare methods: train, resume or reuse a run for every method and seed.

Several processes may share an output folder.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Literal, NamedTuple

import torch
from accelerate import Accelerator
from filelock import FileLock, Timeout
from rich.live import Live

from fedra_engine.callbacks.fingerprint import RESULT_NEUTRAL
from fedra_engine.callbacks.run_folder import COSTS, OUTCOMES, RunFolder, make_folder
from fedra_engine.config import ExperimentConfig
from fedra_engine.config.parsing import read_config
from fedra_engine.experiment import build_experiment
from fedra_engine.methods.registry import method_named
from fedra_engine.run import load_run
from fedra_engine.run import run as train_run
from fedra_engine.runtime.errors import InputError, PrintableFormatter, count_of
from fedra_engine.runtime.exit_codes import closing_notice_to, unwound_by_signals
from fedra_engine.runtime.files import write_whole
from fedra_engine.runtime.measure_text import measure_text, percent
from fedra_engine.runtime.processes import check_cores
from fedra_engine.runtime.tables import PlainConsole, rich_table, table_text
from fedra_engine.studies.comparison_report import REPORT, Findings, TriedPoint, write_report
from fedra_engine.studies.outcomes import SampleOutcomes
from fedra_engine.studies.plan import Candidate, Comparison, PlannedRun, differences, refuse_changes, seed_by_seed
from fedra_engine.studies.references import Measured, PlannedReferences, measure
from fedra_engine.studies.report import command_text
from fedra_engine.studies.results import RunCosts, read_result, read_trial
from fedra_engine.studies.workers import work_off

_ENGINE_LOG = logging.getLogger("fedra_engine")
SECONDS_BETWEEN_LINES = 10.0
"""Per run, if the output is not a terminal."""


class Outcome(NamedTuple):
    """How a run ended: `done` (now or before), `busy` (another process is executing it) or `failed`, with a note."""

    run: PlannedRun
    state: Literal["done", "busy", "failed"]
    note: str


def compare(comparison: Comparison) -> None:
    """Execute the runs of `comparison` that are not finished, show their progress, and report on all of them.

    With several candidates for an entry, their trials come first, and only the best one's runs follow.

    Raises:
        InputError: before any run, the options or a run's folder cannot be used; or, after the report, runs failed.
        ProcessLostError: one of the processes was killed.
    """
    trials, folder, jobs = comparison.trials, comparison.output_dir, comparison.jobs
    if not comparison.oversubscribe:
        most = max(len(trials), sum(len(candidates[0].runs) for candidates in comparison.entries))
        check_cores("jobs", min(jobs, most), advice=" (--oversubscribe true lets runs share cores)")
    check_runs([*trials, *comparison.runs])
    REPORT.check(folder)
    make_folder(folder)
    console = PlainConsole(quiet=comparison.quiet)
    tried = {outcome.run.path: outcome for outcome in _execute_shown(trials, jobs, console)} if trials else {}
    chosen, undecided = list[Candidate](), list[Outcome]()
    for candidates in comparison.entries:
        best = choose(candidates, tried)
        if isinstance(best, Candidate):
            chosen.append(best)
            if best.trial is not None:
                console.print(f"{best.runs[0].label}: chose {best.point}", soft_wrap=True)
        else:
            undecided += [best._replace(run=run) for run in candidates[0].runs]
    outcomes = _execute_shown(seed_by_seed(chosen), jobs, console) if chosen else []
    _conclude(comparison, chosen, [*outcomes, *undecided], list(tried.values()), PlainConsole())


def choose(candidates: Sequence[Candidate], tried: Mapping[Path, Outcome]) -> Candidate | Outcome:
    """The only candidate, or the first of those with the best average accuracy on validation samples.

    Trials that failed are passed over. Returns an outcome, why there is no choice, if all failed or any is still busy.

    Args:
        candidates: of an entry.
        tried: outcomes of their trials, by folder.
    """
    if len(candidates) == 1:
        return candidates[0]
    outcomes = [tried[each.trial.path] for each in candidates if each.trial is not None]
    if any(outcome.state == "busy" for outcome in outcomes):
        return Outcome(outcomes[0].run, "busy", "another process is executing a run of its grid")
    done = [candidate for candidate, outcome in zip(candidates, outcomes, strict=True) if outcome.state == "done"]
    if not done:
        return Outcome(outcomes[0].run, "failed", f"all runs of its grid failed, the first with {outcomes[0].note}")
    return max(done, key=lambda candidate: _accuracy_of_trial(candidate) or 0.0)


def _accuracy_of_trial(candidate: Candidate) -> float | None:
    return None if candidate.trial is None else read_trial(candidate.trial).average


def _execute_shown(runs: Sequence[PlannedRun], jobs: int, console: PlainConsole) -> list[Outcome]:
    """`execute_all`, with progress and outcomes on `console`."""
    what = " on validation samples" if runs[0].is_trial else ""
    console.print(
        f"{count_of(len(runs), 'run')}{what} in {runs[0].path.parent}; each writes its progress to its run.log",
        soft_wrap=True,
    )
    running, reported = {run.title: run for run in runs}, 0

    def report(outcome: Outcome) -> None:
        nonlocal reported
        if outcome.state != "busy":
            reported += 1
            del running[outcome.run.title]
        counter = f"{reported:>{len(str(len(runs)))}}/{len(runs)}"
        # The error at the end counts on the reasons.
        shown = PlainConsole() if console.quiet and outcome.state == "failed" else console
        shown.print(f"{counter}  {outcome.run.title}: {outcome.note}", soft_wrap=True)

    with shown_progress(console, running):
        return execute_all(runs, jobs, report)


def _conclude(
    comparison: Comparison,
    chosen: Sequence[Candidate],
    outcomes: Sequence[Outcome],
    tried: Sequence[Outcome],
    console: PlainConsole,
) -> None:
    """Report on the runs that are done. Raises InputError if there are none, or any failed."""
    folder = comparison.output_dir
    results = [read_result(outcome.run) for outcome in outcomes if outcome.state == "done"]
    if results:
        missing = {outcome.run.title: outcome.note for outcome in (*outcomes, *tried) if outcome.state != "done"}
        references = []
        for measured in _references(comparison, chosen[0], {result.seed for result in results}):
            if measured.found is None:
                missing[measured.plan.title] = measured.note
            else:
                references.append(measured.found)
        first = comparison.runs[0]
        samples = f"{first.config.data.held_out} samples"
        points = _tried_points(comparison, chosen, {outcome.run.path for outcome in tried if outcome.state == "done"})
        findings = Findings(command_text(), samples, first.label, results, references, points, missing)
        for section in write_report(folder, findings):
            table, legend = table_text(rich_table(section.rows)), [" ".join(text.split()) for text in section.legend]
            console.print("", section.title, "", table, *legend, sep="\n", soft_wrap=True)
        where = f"comparison.md, .csv and .tex and accuracy_by_round.png are in {folder}"
        console.print("", where, sep="\n", soft_wrap=True)
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


def _references(comparison: Comparison, first: Candidate, seeds: Collection[int]) -> list[Measured]:
    """The frozen model and the ridge probe of every seed, with the data and the model of the `first` entry's runs."""
    plans = [
        PlannedReferences(run.config, comparison.output_dir / "references")
        for run in first.runs
        if run.config.seed in seeds
    ]
    measured = list[Measured]()
    with _resumable():
        work_off(plans, comparison.jobs, measure, measured.append)
    return sorted(measured, key=lambda each: plans.index(each.plan))


def _tried_points(comparison: Comparison, chosen: Sequence[Candidate], done: Collection[Path]) -> list[TriedPoint]:
    """The points of the grid, for the report; `done` are the folders of trials that have finished."""
    return [
        TriedPoint(
            each.runs[0].label,
            each.point,
            _accuracy_of_trial(each) if each.trial.path in done else None,
            each in chosen,
            each.at_edge,
        )
        for candidates in comparison.entries
        for each in candidates
        if each.trial is not None
    ]


def check_runs(runs: Sequence[PlannedRun]) -> None:
    """Raise InputError if a method does not exist, or a run's folder belongs to something else."""
    for run in runs:
        method_named(run.config.method.name)
        earlier_run(run)


def earlier_run(run: PlannedRun) -> RunFolder | None:
    """The folder of `run`, None if it has not begun; InputError if the folder belongs to something else."""
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
    """Execute `runs`, `jobs` at a time; runs that another process was executing are tried once more at the end.

    An interrupt, or an error other than bad input, stops all runs; the same command resumes them.

    Args:
        report: called with every outcome as soon as it is known.

    Returns:
        The last outcome of each run, in order.

    Raises:
        ProcessLostError: one of the processes was killed.
    """
    outcomes: dict[str, Outcome] = {}

    def keep(outcome: Outcome) -> None:
        outcomes[outcome.run.title] = outcome
        report(outcome)

    with _resumable():
        work_off(runs, jobs, execute, keep)
        work_off([run for run in runs if outcomes[run.title].state == "busy"], jobs, execute, keep)
    return [outcomes[run.title] for run in runs]


@contextmanager
def _resumable() -> Iterator[None]:
    """Let an interrupt say what to do next."""
    with unwound_by_signals():
        try:
            yield
        except (KeyboardInterrupt, OSError) as error:
            error.add_note("the same command resumes it")
            raise


def execute(run: PlannedRun) -> Outcome:
    """Finish a run, unless another process is executing it."""
    try:
        with FileLock(run.lock_file, timeout=0):
            before = _finish(run)
        result = read_trial(run) if run.is_trial else read_result(run)
    except Timeout:
        return Outcome(run, "busy", "another process is executing it")
    except InputError as error:
        return Outcome(run, "failed", str(error))
    accuracy = f"{percent(result.average)} after {count_of(result.rounds, 'round')}, {result.seconds:.0f} s"
    caution = f"; note: {result.caution}" if result.caution else ""
    return Outcome(run, "done", f"{accuracy}{before}{caution}")


@contextmanager
def warnings_named(title: str) -> Iterator[None]:
    """Put a run's `title` before the warnings that the engine writes to stderr, where those of all runs are."""
    handler = logging.StreamHandler()
    handler.setLevel(logging.WARNING)
    handler.setFormatter(PrintableFormatter(f"{title.replace('%', '%%')}: %(message)s"))
    _ENGINE_LOG.addHandler(handler)
    try:
        yield
    finally:
        _ENGINE_LOG.removeHandler(handler)


def _finish(run: PlannedRun) -> str:
    """Train the missing rounds and write what the report needs. Returns a note on what was there before."""
    earlier = earlier_run(run)
    finished = earlier is not None and earlier.summary_file.is_file()
    if finished:
        result = load_run(run.path)
    else:
        # The output of many runs would mix, so each goes to its log only.
        console = PlainConsole(quiet=True, force_terminal=False)
        with warnings_named(run.title):
            result = train_run(run.config, earlier, accelerator=Accelerator(), console=console)
    if not run.is_trial:
        if not (run.path / COSTS).is_file():
            costs = count_costs(run.config, read_trial(run).rounds)
            write_whole(run.path / COSTS, json.dumps(asdict(costs), indent=2) + "\n")
        if not (run.path / OUTCOMES).is_file():
            # Of a run that is loaded, the experiment is only built here.
            SampleOutcomes.of(result.experiment, result.state).write(run.path)
    if finished:
        return " (finished before)"
    return "" if earlier is None else " (interrupted before, resumed)"


@contextmanager
def shown_progress(console: PlainConsole, runs: Mapping[str, PlannedRun]) -> Iterator[None]:
    """Show, while entered, the progress of `runs`, by title: live in a terminal, elsewhere line by line.

    A run has at most one line in `SECONDS_BETWEEN_LINES`. Runs that are removed from `runs` are no longer shown.
    """
    said, over = {title: _progress_text(run) for title, run in runs.items()}, threading.Event()

    def news() -> dict[str, str]:
        texts = {title: _progress_text(run) for title, run in list(runs.items())}
        return {title: f"{title}: {text}" for title, text in texts.items() if text not in ("", said[title])}

    def print_news() -> None:
        while not over.wait(SECONDS_BETWEEN_LINES):
            for title, line in news().items():
                console.print(line, soft_wrap=True)
                said[title] = line.removeprefix(f"{title}: ")

    if console.can_redraw:
        notices = list[str]()

        def lines() -> str:
            return "\n".join([*news().values(), *notices])

        with (
            closing_notice_to(notices.append),
            Live(console=console, get_renderable=lines, refresh_per_second=1, transient=True),
        ):
            yield
        return
    thread = threading.Thread(target=print_news, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _progress_text(run: PlannedRun) -> str:
    """The run's round, loss and accuracy; empty if it has no records, or damaged ones, which fail it later."""
    try:
        records = RunFolder(run.path).read_metrics()
        done, losses = records[-1]["round"] + 1, [record["loss"] for record in records if record["loss"] is not None]
        accuracies = [mean(record["accuracy"].values()) for record in records if "accuracy" in record]
    except (ValueError, LookupError, TypeError, AttributeError):
        return ""
    loss = [f"loss {measure_text('loss', loss)}" for loss in losses[-1:]]
    accuracy = [f"accuracy {percent(accuracy)}" for accuracy in accuracies[-1:]]
    return ", ".join([f"round {done} of {run.config.rounds}", *loss, *accuracy])


def count_costs(config: ExperimentConfig, rounds: int | None = None) -> RunCosts:
    """Count the costs of a run, by the formulas of `costs/model.py`, without training.

    The participants, assignments and devices of its first `rounds` (all, if not given: a run may end early) are drawn
    again from the seed. Participants whose updates do not arrive are not counted. Methods whose assignment depends on
    earlier rounds are counted as if every round began with the initial state.

    Raises:
        InputError: something in the configuration cannot be used.
    """
    experiment = build_experiment(config, torch.device("cpu"))
    trainable, uploaded, participations, flops = 0.0, 0.0, 0, 0.0
    for round in range(config.rounds if rounds is None else rounds):
        work, assignment, _ = experiment.round_work(round)
        costs = experiment.costs_of(work, assignment)
        participations += len(work.participants)
        trainable += float(costs.trained.sum())
        uploaded += float(costs.uploaded.sum())
        flops += float(costs.flops.sum())
    times = max(participations, 1)
    return RunCosts(trainable / times, uploaded / times, flops)
