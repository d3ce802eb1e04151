"""What a run shows: a live display in a terminal, plain lines elsewhere, and the same lines in a log file."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from statistics import mean
from types import TracebackType
from typing import Any, Self

from rich.live import Live

from fedra_engine.callback import Callback, Evaluation, Outcome, Round, Update
from fedra_engine.callbacks.description import describe
from fedra_engine.callbacks.live_view import LiveView, header_rows
from fedra_engine.callbacks.meter import Meter
from fedra_engine.callbacks.run_folder import measuring_command
from fedra_engine.config import ExperimentConfig
from fedra_engine.config.data import HeldOut
from fedra_engine.config.fields import settings
from fedra_engine.experiment import Experiment
from fedra_engine.federation.averages import average
from fedra_engine.federation.clients import most_participants
from fedra_engine.federation.records import RoundMetrics
from fedra_engine.models.state import GlobalState
from fedra_engine.runtime.errors import InputError, PrintableFormatter, ProcessLostError, count_of, printable
from fedra_engine.runtime.exit_codes import closing_notice_to
from fedra_engine.runtime.files import writing
from fedra_engine.runtime.measure_text import (
    change_text,
    measure_name,
    measure_number,
    measure_text,
    measure_title,
    percent,
)
from fedra_engine.runtime.stages import LOCAL_STEPS, SlowStages, Stage
from fedra_engine.runtime.tables import PlainConsole, rich_table, table_text

_ENGINE_LOG = logging.getLogger("fedra_engine")
_SECONDS_BETWEEN_REFRESHES = 0.5
"""Each takes about two milliseconds of the CPU that trains."""


class _LogFile(logging.FileHandler):
    """Raises an error in writing, where its base class prints a traceback."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Raise the exception that is being handled, with the name of the file."""
        with writing(Path(self.baseFilename)):
            raise


class _Shown(logging.Handler):
    """Passes on what is less than a warning, as warnings have another handler."""

    def __init__(self, show: Callable[[logging.LogRecord], None]) -> None:
        super().__init__()
        self._show = show

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno < logging.WARNING:
            self._show(record)


class Console(Callback):
    """Shows a run and keeps its log; a context manager that owns the display, the log file and what the engine logs.

    In a terminal there is a live display, above which notes and warnings are printed; elsewhere there are lines. Both
    end with a table of accuracies and the files that were written.

    Attributes:
        view: what the display draws.
    """

    def __init__(
        self,
        log_file: Path | None,
        console: PlainConsole | None = None,
        *,
        config: ExperimentConfig | None = None,
        level: int = logging.INFO,
        results_only: bool = False,
    ) -> None:
        """Append to `log_file`, if any, and write to `console`.

        Args:
            log_file: in the run's folder.
            console: stdout if not given.
            config: of the run, for the display while its experiment is still being built.
            level: the least severe messages, of Python's logging, that are shown and logged.
            results_only: show the results alone; the log has everything.
        """
        self._console = PlainConsole() if console is None else console
        self._log = logging.NullHandler() if log_file is None else _LogFile(log_file, encoding="utf-8")
        self._log.setFormatter(PrintableFormatter("%(asctime)s  %(message)s"))
        self._has_log = log_file is not None
        self._level, self._results_only = level, results_only
        self._undo = ExitStack()
        self._meter, self._slow, self._over = Meter(), SlowStages(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.view = LiveView(self._meter, {} if config is None else planned(config, log_file))
        self._live: Live | None = None
        if self._console.can_redraw and not results_only:
            # Warnings stay in the file to which stderr may go.
            over = sys.stderr.isatty()
            self._live = Live(
                self.view, console=self._console, auto_refresh=False, transient=True, redirect_stderr=over
            )
        self._next = 0
        self._meter.rounds = 0 if config is None else config.rounds
        self._outcome: Outcome | None = None
        self._held_out: HeldOut = "test"
        self._settings = dict[str, Any]()

    @classmethod
    def silent(cls) -> Console:
        """A console that prints and writes nothing, for all processes of a job but the main one."""
        return cls(None, PlainConsole(quiet=True, force_terminal=False))

    def __enter__(self) -> Self:
        # Also if the terminal goes away meanwhile, or the user does not wait for the end.
        with ExitStack() as undo:
            undo.callback(self._log.close)
            listens = self._has_log or not self._console.quiet
            if listens:
                self._listen(undo)
            if self._live is not None:
                undo.enter_context(closing_notice_to(self.view.show_notice))
                self._live.start(refresh=True)
                undo.callback(self._live.stop)
            if listens:
                self._thread.start()
                undo.callback(self._stop_watching)
            self._undo = undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A full disk or a lost terminal may be what stopped the run.
        with suppress(OSError) if error is not None else nullcontext(), self._undo:
            if error is not None:
                self._write_log(f"stopped: {_reason(error)}")

    def on_start(self, experiment: Experiment, state: GlobalState, first_round: int) -> None:
        config = experiment.config
        facts = {"method": _method_text(config), **describe(experiment), **experiment.choices}
        if (count := experiment.newly_cached) is not None:
            facts["samples"] += f"; {count:,} preprocessed now" if count else "; all were in the cache"
        width = max(map(len, facts))
        for name, value in facts.items():
            self.detail(f"{name:<{width}}  {value}")
        notes = [*experiment.train_data.notes]
        if experiment.method.caution is not None:
            notes.append(f"note: {experiment.method.caution}")
        if first_round > 0:
            begun = first_round < config.rounds
            going = f"resumed after round {first_round} of" if begun else "finished before, with all of"
            notes.append(f"{going} {config.rounds} rounds")
        for note in notes:
            self.message(note)
        self.view.header = {name: facts.get(name, text) for name, text in self.view.header.items()}
        self.view.lanes, self.view.processes = experiment.executor.lanes, experiment.processes.count
        self.view.device = experiment.initial_state.heads.device
        self._meter.expected = most_participants(config.clients, experiment.clients)
        self._next = self._meter.rounds_done = first_round
        self._meter.rounds = config.rounds

    def on_update(self, experiment: Experiment, update: Update) -> None:
        trained = update.trained
        self._meter.participants = update.participants
        # Memory may have run out with more.
        self.view.lanes = experiment.executor.lanes
        self._meter.trained(trained.clients, trained.samples, trained.mean_loss)

    def on_evaluate(self, experiment: Experiment, state: GlobalState, evaluation: Evaluation) -> None:
        if evaluation.metrics is not None:
            self._finish_round(evaluation.metrics)
            self._meter.evaluations.append(evaluation.accuracy)
            self.detail(f"accuracy after round {evaluation.metrics.round + 1}: {_accuracy_text(evaluation.accuracy)}")
            if others := {name: average(of) for name, of in evaluation.measures.items() if name != "accuracy"}:
                held_out = experiment.config.data.held_out
                texts = [
                    f"{measure_name(name, held_out)} {measure_text(name, value)}" for name, value in others.items()
                ]
                self.detail(f"on average: {', '.join(texts)}")
            return
        self._meter.frozen = evaluation.accuracy
        if self._next < self._meter.rounds:
            self.begin_round(self._next, self._meter.rounds)

    def on_round(self, experiment: Experiment, state: GlobalState, round: Round) -> None:
        self._finish_round(round.metrics)
        if round.metrics.round + 1 < self._meter.rounds:
            self.begin_round(round.metrics.round + 1, self._meter.rounds)

    def on_end(self, experiment: Experiment, state: GlobalState, outcome: Outcome) -> None:
        # A round that was begun may have been stopped before it was trained.
        self._meter.in_round, self._outcome = False, outcome
        self._held_out = experiment.config.data.held_out
        self._settings = {setting.name: setting.value for setting in settings(experiment.config)}
        if outcome.stopped is not None:
            self.message(_stopped_text(outcome))
            stopping = experiment.config.early_stopping
            if stopping.patience is not None and experiment.config.keep_best is None:
                self.message(
                    f"this run had no --keep_best {stopping.measure}, which keeps the best round for fedra evaluate "
                    "--best"
                )
        for name, accuracy in (("frozen", outcome.frozen), ("tuned", outcome.tuned)):
            self._write_log(f"{name}: {_accuracy_text(accuracy)}")
        if changes := _changes_text(outcome, self._held_out):
            self._write_log(changes)

    def remember(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Show what earlier processes have measured, too; `records` are lines of `metrics.jsonl`."""
        self._meter.remember(records)

    def begin_round(self, round: int, rounds: int) -> None:
        """Show that round `round` (from 0) of `rounds` has begun."""
        self._next = round
        self._meter.round_started(round, rounds)

    def message(self, text: str) -> None:
        """Print and log a text, in a terminal above the display."""
        if self._level <= logging.INFO:
            if not self._results_only:
                self._print(text)
            self._write_log(text)

    def detail(self, text: str) -> None:
        """Log a text, and print it where there is no live display, which shows the same or has no room for it."""
        if self._level <= logging.INFO:
            if self._live is None and not self._results_only:
                self._print(text)
            self._write_log(text)

    def finish(self, written: Mapping[str, Path], commands: Mapping[str, str] | None = None) -> None:
        """End the display, and print the results of the run.

        Args:
            written: the paths that were written, by title.
            commands: those that show more of the run, by title.
        """
        self._stop_watching()
        if self._live is not None:
            self._live.stop()
            self._console.print(*header_rows(self.view.header), sep="\n", soft_wrap=True)
        if self._outcome is not None:
            if self._results_only and self._outcome.stopped is not None:
                self._print(_stopped_text(self._outcome))
            self._print("\n" + results_text(self._outcome, self._held_out))
        if not self._results_only and written:
            lines = {**{title: str(path) for title, path in written.items()}, **(commands or {})}
            width = max(map(len, lines))
            self._print("\n" + "\n".join(f"{title:<{width}}  {text}" for title, text in lines.items()))
            if "best round" in written and (command := measuring_command(written["run folder"], self._settings)):
                self._print(f"\nbest round on the test samples:  {command}")

    def _finish_round(self, metrics: RoundMetrics) -> None:
        """Print and log a round's line, unless that has been done."""
        if self._meter.rounds_done > metrics.round:
            return
        self._meter.round_finished(metrics)
        left_out = f"  {metrics.bad_updates} left out" if metrics.bad_updates else ""
        self.detail(f"round {self._meter.round_text()}  {self._meter.status_text()}{left_out}")

    def _watch(self) -> None:
        """Refresh the display and mention what is slow, until the run is over."""
        # What cannot be written here cannot be written by the main thread either, which then says so.
        with suppress(OSError):
            while not self._over.wait(_SECONDS_BETWEEN_REFRESHES):
                if (stage := self._slow.due()) is not None:
                    self.detail(self._slow_text(stage))
                if self._live is not None:
                    self._live.refresh()

    def _slow_text(self, stage: Stage) -> str:
        """The line of a stage that takes long."""
        meter = self._meter
        if stage.what != LOCAL_STEPS:
            return str(stage)
        steps = f"{stage.done:,} of {stage.total:,} {stage.what}"
        clients = f"{meter.clients:,} of {meter.participants or '?'} clients"
        return f"round {meter.rounds_done + 1}/{meter.rounds} … {steps}, {clients}"

    def _listen(self, undo: ExitStack) -> None:
        """Keep and show what the engine logs, until `undo`."""
        handlers: list[logging.Handler] = [self._log]
        if logging.lastResort and not self._results_only and not _ENGINE_LOG.hasHandlers():
            # A logger with a handler of its own no longer sends warnings to stderr.
            handlers.append(logging.lastResort)
        if _ENGINE_LOG.level == logging.NOTSET:
            handlers.append(_Shown(self._show_record))
            undo.callback(_ENGINE_LOG.setLevel, logging.NOTSET)
            _ENGINE_LOG.setLevel(self._level)
        for handler in handlers:
            undo.callback(_ENGINE_LOG.removeHandler, handler)
            _ENGINE_LOG.addHandler(handler)

    def _stop_watching(self) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def _show_record(self, record: logging.LogRecord) -> None:
        """Print what the engine logs; details would push what is above a live display out of sight."""
        if not self._results_only and (self._live is None or record.levelno >= logging.INFO):
            self._print(record.getMessage())

    def _print(self, text: str) -> None:
        self._console.print(text, soft_wrap=True)

    def _write_log(self, text: str) -> None:
        self._log.handle(logging.makeLogRecord({"msg": text}))


def _reason(error: BaseException) -> str:
    """What ended a run, in words where there are some."""
    if isinstance(error, KeyboardInterrupt):
        return str(error) or "interrupted"
    if isinstance(error, InputError | ProcessLostError):
        return str(error)
    return f"{type(error).__name__}: {error}".removesuffix(": ")


def _stopped_text(outcome: Outcome) -> str:
    """That a run was stopped early, and why if that is known."""
    return f"stopped after round {outcome.rounds}{': ' if outcome.stopped else ''}{outcome.stopped}"


def planned(config: ExperimentConfig, log_file: Path | None) -> dict[str, str]:
    """What is known of a run before its experiment is built, by the titles of the display's header."""
    header = {"method": _method_text(config), "model": config.model.path, "clients": "…", "samples": "…"}
    return header if log_file is None else header | {"folder": str(log_file.parent)}


def results_text(outcome: Outcome, held_out: HeldOut) -> str:
    """The accuracies before and after a run as a table, other measures, and what is tuned if that is not obvious.

    Those of validation samples are called so; `held_out` says which were evaluated.
    """
    title = measure_title("accuracy") if held_out == "test" else f"{held_out} {measure_title('accuracy')}"
    rows = [[title, *outcome.tuned, "average"]]
    for name, accuracy in (("frozen", outcome.frozen), ("tuned", outcome.tuned)):
        values = (*(accuracy[domain] for domain in outcome.tuned), mean(accuracy.values()))
        rows.append([name, *(measure_number("accuracy", value) for value in values)])
    text = table_text(rich_table(rows))
    if changes := _changes_text(outcome, held_out):
        text += f"\n{changes}"
    if outcome.tuned_is is not None:
        exported = percent(mean(outcome.exported.values()))
        text += f"\nnote: tuned is the accuracy of {outcome.tuned_is}; the adapter alone has {exported} on average"
    return text


def _changes_text(outcome: Outcome, held_out: HeldOut) -> str:
    """The averages of all measures but accuracy before and after the run; empty if there are none."""
    changes = [
        f"{measure_name(name, held_out)} {change_text(name, average(of_domain), average(outcome.tuned_measures[name]))}"
        for name, of_domain in outcome.frozen_measures.items()
        if name != "accuracy"
    ]
    return f"on average: {', '.join(changes)}" if changes else ""


def _method_text(config: ExperimentConfig) -> str:
    return f"{config.method.name}, {count_of(config.rounds, 'round')}, seed {config.seed}"


def _accuracy_text(accuracy: Mapping[str, float]) -> str:
    by_domain = ", ".join(f"{printable(domain)} {percent(value)}" for domain, value in accuracy.items())
    return f"{percent(mean(accuracy.values()))} ({by_domain})"
