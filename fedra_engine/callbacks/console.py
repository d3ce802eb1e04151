"""What a run prints: progress bars in a terminal, plain lines elsewhere, and the same in a log file."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from statistics import mean
from types import TracebackType
from typing import Self

import torch
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedra_engine.callback import Callback, Evaluation, Outcome, Round, Update
from fedra_engine.experiment import Experiment
from fedra_engine.federation.records import RoundMetrics, average
from fedra_engine.models.sharding import is_sharded, parameter_count
from fedra_engine.models.state import GlobalState
from fedra_engine.runtime.errors import PrintableFormatter, count_of, printable
from fedra_engine.runtime.files import writing
from fedra_engine.runtime.stages import Stage
from fedra_engine.runtime.tables import PlainConsole, rich_table, table_text

_ENGINE_LOG = logging.getLogger("fedra_engine")
_REFRESHES_PER_SECOND = 2
"""Each takes milliseconds of the CPU that trains."""
_SECONDS_BETWEEN_LOSSES = 1.0
"""Reading a loss waits for the GPU, which is then idle."""


class _LogFile(logging.FileHandler):
    """Raises an error in writing, where its base class prints a traceback."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Raise the exception that is being handled, with the name of the file."""
        with writing(Path(self.baseFilename)):
            raise


class Console(Callback):
    """Shows a run's progress; a context manager that owns the live display and the log file.

    While entered, it also logs the engine's warnings, and shows and logs its messages on slow steps.
    """

    def __init__(self, log_file: Path | None, console: PlainConsole | None = None) -> None:
        """Append to `log_file`, if any; write to `console`, which is stdout if not given."""
        self._console = PlainConsole() if console is None else console
        self._log = logging.NullHandler() if log_file is None else _LogFile(log_file, encoding="utf-8")
        self._log.setFormatter(PrintableFormatter("%(asctime)s  %(message)s"))
        self._handlers: list[logging.Handler] = [] if log_file is None else [self._log]
        self._meter = Meter()
        self._live = live_progress(self._console, self._meter) if self._console.is_terminal else None
        self._round = Stage("")
        self._next = self._rounds = 0

    @classmethod
    def silent(cls) -> Console:
        """A console that prints and writes nothing, for all processes of a job but the main one."""
        return cls(None, PlainConsole(quiet=True, force_terminal=False))

    def __enter__(self) -> Self:
        if self._handlers and logging.lastResort and not _ENGINE_LOG.hasHandlers():
            # A logger with a handler of its own no longer sends warnings to stderr.
            self._handlers.append(logging.lastResort)
        self._level = _ENGINE_LOG.level
        if self._level == logging.NOTSET and (self._handlers or not self._console.quiet):
            self._handlers.append(_Shown(self._print))
            _ENGINE_LOG.setLevel(logging.INFO)
        for handler in self._handlers:
            _ENGINE_LOG.addHandler(handler)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop_showing()
        for handler in self._handlers:
            _ENGINE_LOG.removeHandler(handler)
        _ENGINE_LOG.setLevel(self._level)
        # A full disk may be what stopped the run.
        with suppress(OSError) if error is not None else nullcontext():
            if error is not None:
                self._write_log(f"stopped: {type(error).__name__}: {error}".removesuffix(": "))
            self._log.close()

    def on_start(self, experiment: Experiment, state: GlobalState, first_round: int) -> None:
        config, method = experiment.config, experiment.method
        facts = {"method": f"{config.method.name}, {count_of(config.rounds, 'round')}, seed {config.seed}"}
        facts |= describe(experiment)
        width = max(map(len, facts))
        lines = [*(f"{name:<{width}}  {value}" for name, value in facts.items()), *experiment.train_data.notes]
        if method.caution is not None:
            lines.append(f"note: {method.caution}")
        if first_round > 0:
            begun = first_round < config.rounds
            going = f"going on after round {first_round} of" if begun else "finished before, with all of"
            lines.append(f"{going} {config.rounds} rounds")
        for line in lines:
            self.message(line)
        self._next, self._rounds = first_round, config.rounds

    def on_update(self, experiment: Experiment, update: Update) -> None:
        trained = update.trained
        self._meter.participants = self._round.total = update.participants
        self._round.advance(trained.clients - self._meter.clients)
        self._meter.trained(trained.clients, trained.samples, trained.mean_loss)

    def on_evaluate(self, experiment: Experiment, state: GlobalState, evaluation: Evaluation) -> None:
        if evaluation.metrics is not None:
            self._finish(evaluation.metrics)
            self.message(f"accuracy after round {evaluation.metrics.round + 1}: {_accuracy_text(evaluation.accuracy)}")
            if others := {name: average(of) for name, of in evaluation.measures.items() if name != "accuracy"}:
                self.message("on average: " + ", ".join(f"{name} {value:.4g}" for name, value in others.items()))
        elif self._next < self._rounds:
            self.begin_round(self._next, self._rounds)

    def on_round(self, experiment: Experiment, state: GlobalState, round: Round) -> None:
        self._finish(round.metrics)
        if round.metrics.round + 1 < self._rounds:
            self.begin_round(round.metrics.round + 1, self._rounds)

    def on_end(self, experiment: Experiment, state: GlobalState, outcome: Outcome) -> None:
        # A round that was begun may have been stopped before it was trained.
        self._stop_showing()
        if outcome.stopped is not None:
            self.message(f"stopped after round {outcome.rounds}{': ' if outcome.stopped else ''}{outcome.stopped}")
        rows = {"frozen": outcome.frozen, "tuned": outcome.tuned}
        body = [
            [name, *(_percent(accuracy[domain]) for domain in outcome.tuned), _percent(mean(accuracy.values()))]
            for name, accuracy in rows.items()
        ]
        self._print("\n" + table_text(rich_table([["accuracy (%)", *outcome.tuned, "average"], *body])))
        for name, accuracy in rows.items():
            self._write_log(f"{name}: {_accuracy_text(accuracy)}")
        changes = [
            f"{name} {average(of_domain):.4g} → {average(outcome.tuned_measures[name]):.4g}"
            for name, of_domain in outcome.frozen_measures.items()
            if name != "accuracy"
        ]
        if changes:
            self.message(f"on average: {', '.join(changes)}")
        if outcome.tuned_is is not None:
            exported = 100 * mean(outcome.exported.values())
            self.message(
                f"note: tuned is the accuracy of {outcome.tuned_is}; the adapter alone has {exported:.1f} % on average"
            )

    def message(self, text: str) -> None:
        """Print and log a text."""
        self._print(text)
        self._write_log(text)

    def begin_round(self, round: int, rounds: int) -> None:
        """Show that round `round` (from 0) of `rounds` has begun."""
        self._next, self._rounds = round, rounds
        self._meter.round_started(round, rounds)
        if self._live is not None:
            self._live.start()
        else:
            self._round = Stage(f"training clients of round {round + 1} of {rounds}").__enter__()

    def _finish(self, metrics: RoundMetrics) -> None:
        """Print a round's line and log its record, unless that has been done."""
        if self._meter.rounds_done > metrics.round:
            return
        self._round.__exit__(None, None, None)
        self._meter.round_finished(metrics)
        left_out = f"  {metrics.bad_updates} left out" if metrics.bad_updates else ""
        line = f"round {self._meter.round_text()}  {self._meter.status_text()}{left_out}"
        if self._live is None:
            self._print(line)
        # Who held what is in the records, and would fill the log; so would measures by domain.
        numbers = replace(metrics, measures=None, allocation=None, trained=None, holders=None)
        self._write_log(f"{line}  {numbers.record()}")

    def _stop_showing(self) -> None:
        if self._live is not None:
            self._live.stop()
        self._round.__exit__(None, None, None)

    def _print(self, text: str) -> None:
        self._console.print(text, soft_wrap=True)

    def _write_log(self, text: str) -> None:
        self._log.emit(logging.makeLogRecord({"msg": text}))


class _Shown(logging.Handler):
    """Shows INFO messages only, as warnings have another handler."""

    def __init__(self, show: Callable[[str], None]) -> None:
        super().__init__(logging.INFO)
        self._show = show

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno == logging.INFO:
            self._show(record.getMessage())


def describe(experiment: Experiment) -> dict[str, str]:
    """Facts to show before the first round, by title."""
    foundation, device = experiment.foundation, experiment.initial_state.heads.device
    size = parameter_count(foundation.model)
    kept = " in shards" if is_sharded(foundation.model) else ""
    targets = ", ".join(target.path for target in foundation.adapter_layout.targets)
    count, made = experiment.newly_cached, ""
    if count is not None:
        made = f"; {count:,} preprocessed now" if count else "; all were in the cache"
    facts = {
        "model": f"{type(foundation.model).__name__}, {foundation.depth} blocks, {size:,} frozen parameters{kept}",
        "adapters": f"{foundation.adapter_layout.size:,} LoRA parameters per block on {targets}",
        "head": f"{foundation.head_layout.trained_size:,} parameters",
        "clients": f"{len(experiment.clients)} in {len(experiment.domains)} domains",
        "samples": f"{len(experiment.train_data):,} for training{made}",
        "lanes": str(experiment.executor.lanes),
        "blocks": f"{experiment.sweep_model.fused} of {foundation.depth} fused",
        "device": f"cpu, {count_of(torch.get_num_threads(), 'thread')}" if device.type == "cpu" else str(device),
    }
    if experiment.processes.count > 1:
        facts["processes"] = str(experiment.processes.count)
    return facts


def _accuracy_text(accuracy: Mapping[str, float]) -> str:
    by_domain = "  ".join(f"{printable(domain)} {_percent(value)}" for domain, value in accuracy.items())
    return f"{_percent(mean(accuracy.values()))}  ({by_domain})"


def _percent(accuracy: float) -> str:
    return f"{100 * accuracy:.1f}"


class Meter:
    """Counts rounds, clients and samples, and times them; `clock` returns seconds."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.rounds = self.rounds_done = self.participants = self.clients = 0
        self._loss: float | None = None
        self._loss_read = -math.inf
        self._samples = self._first_round = 0
        self._began: float | None = None
        self._round_began = self._round_seconds = 0.0

    def round_started(self, round: int, rounds: int) -> None:
        """Start the counts of a round; the number of its participants is set later."""
        self._round_began = self._clock()
        if self._began is None:
            self._began, self._first_round = self._round_began, round
        self.rounds, self.rounds_done = rounds, round
        self.participants = self.clients = self._samples = 0

    def trained(self, clients: int, samples: int, loss: Callable[[], float | None]) -> None:
        """Set how many clients of the round have trained, on how many samples; `loss` reads their mean loss."""
        self.clients, self._samples = clients, samples
        now = self._clock()
        if now - self._loss_read >= _SECONDS_BETWEEN_LOSSES:
            self._loss, self._loss_read = loss(), now
        self._round_seconds = now - self._round_began

    def round_finished(self, metrics: RoundMetrics) -> None:
        """Set the counts to those of all processes."""
        self._loss, self._round_seconds = metrics.loss, metrics.seconds
        self.clients, self._samples = metrics.participants, metrics.samples
        self.rounds_done += 1

    def round_text(self) -> str:
        """Rounds done, as in `3/60`."""
        return f"{self.rounds_done:>{len(str(self.rounds))}}/{self.rounds}"

    def status_text(self) -> str:
        """Loss, speed, and the time left at the pace so far."""
        speed = self._samples / self._round_seconds if self._round_seconds else 0.0
        loss = "–" if self._loss is None or math.isnan(self._loss) else f"{self._loss:.4f}"
        left, done = "-:--:--", self.rounds_done - self._first_round
        if self._began is not None and done:
            seconds = (self._clock() - self._began) / done * (self.rounds - self.rounds_done)
            left = str(timedelta(seconds=round(seconds)))
        return f"loss {loss}  {self.clients} clients  {speed:,.0f} samples/s  ETA {left}"


def live_progress(console: PlainConsole, meter: Meter) -> Live:
    """A terminal's live display of `meter`: bars of the rounds and of the round's clients, and its text."""

    def draw() -> RenderableType:
        bars = Table.grid(padding=(0, 1))
        for name, done, total in (
            ("rounds", meter.rounds_done, meter.rounds),
            ("clients", meter.clients, meter.participants),
        ):
            bars.add_row(name, ProgressBar(total=total or 1, completed=done, width=32), f"{done}/{total or '?'}")
        return Group(bars, Text(meter.status_text()))

    return Live(console=console, get_renderable=draw, refresh_per_second=_REFRESHES_PER_SECOND, transient=True)
