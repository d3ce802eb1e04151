"""What a run prints: a live display in a terminal, plain lines elsewhere, and all of it in a log."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import mean
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.table import Table

from fedra_engine.config import ExperimentConfig
from fedra_engine.reporting.progress import LiveProgress, Meter
from fedra_engine.stages import Stage

Accuracies = Mapping[str, float]
"""Top-1 accuracy (0…1) by domain."""
_ENGINE_LOG = logging.getLogger("fedra_engine")
"""Receives the warnings of every part of the engine."""


class Reporter:
    """Shows how a run goes; a context manager that owns the live display and the log file.

    While it is entered, the log file gets the engine's warnings, too, and console and log say what takes long.
    """

    def __init__(self, log_file: Path | None, console: Console | None = None) -> None:
        """Append to `log_file`, if any; write to `console`, which is stdout if not given."""
        self._console = Console(highlight=False) if console is None else console
        self._log = logging.NullHandler() if log_file is None else logging.FileHandler(log_file, encoding="utf-8")
        self._log.setFormatter(logging.Formatter("%(asctime)s  %(message)s"))
        self._warning_handlers: list[logging.Handler] = [] if log_file is None else [self._log]
        self._meter = Meter()
        self._live = LiveProgress(self._console, self._meter) if self._console.is_terminal else None
        self._round = Stage("")

    @classmethod
    def silent(cls) -> Reporter:
        """Prints and writes nothing: for all processes of a job but the main one."""
        return cls(None, Console(quiet=True, force_terminal=False))

    def __enter__(self) -> Self:
        if self._warning_handlers and logging.lastResort and not _ENGINE_LOG.hasHandlers():
            # A logger with a handler no longer sends warnings to stderr, so that one is added, too.
            self._warning_handlers.append(logging.lastResort)
        self._level = _ENGINE_LOG.level
        if self._level == logging.NOTSET and (self._warning_handlers or not self._console.quiet):
            self._warning_handlers.append(_Shown(self._print))
            _ENGINE_LOG.setLevel(logging.INFO)
        for handler in self._warning_handlers:
            _ENGINE_LOG.addHandler(handler)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
        self._round.__exit__(None, None, None)
        if error is not None:
            self._write_log(f"stopped: {type(error).__name__}: {error}".removesuffix(": "))
        for handler in self._warning_handlers:
            _ENGINE_LOG.removeHandler(handler)
        _ENGINE_LOG.setLevel(self._level)
        self._log.close()

    def start(self, config: ExperimentConfig, facts: Mapping[str, str | int | float]) -> None:
        """Show what the experiment consists of, each fact under its name."""
        facts = {"method": f"{config.method.name}, {config.rounds} rounds, seed {config.seed}", **facts}
        width = max(map(len, facts))
        for name, value in facts.items():
            self.message(f"{name:<{width}}  {value}")

    def message(self, text: str) -> None:
        """Print a text, and log it."""
        self._print(text)
        self._write_log(text)

    def round_started(self, round: int, rounds: int, participants: int) -> None:
        """Round `round` (from 0) of `rounds` begins."""
        self._meter.round_started(round, rounds, participants)
        if self._live is not None:
            self._live.start()
        else:
            self._round = Stage(f"training clients of round {round + 1} of {rounds}", participants).__enter__()

    def trained(self, clients: int, samples: int, loss: Callable[[], float | None]) -> None:
        """So far `clients` of the round have trained, on `samples` samples; `loss` gives their mean loss."""
        self._round.advance(clients - self._meter.clients)
        self._meter.trained(clients, samples, loss)

    def round_finished(self, record: Mapping[str, Any]) -> None:
        """The round with these metrics is over. Plain output gets a line of it; the log gets all of it."""
        self._round.__exit__(None, None, None)
        self._meter.round_finished(record["loss"])
        line = f"round {self._meter.round_text()}  {self._meter.status_text()}"
        if self._live is None:
            self._print(line)
        self._write_log(f"{line}  {dict(record)}")

    def evaluating(self, samples: int) -> None:
        """An evaluation on `samples` samples begins, which may take a while."""
        self._print(f"evaluating on {samples:,} test samples …")

    def evaluated(self, round: int, accuracy: Accuracies) -> None:
        """The global model after `round` has this accuracy."""
        by_domain = "  ".join(f"{domain} {_percent(value)}" for domain, value in accuracy.items())
        self.message(f"accuracy after round {round + 1}: {_percent(mean(accuracy.values()))}  ({by_domain})")

    def finished(self, frozen: Accuracies, tuned: Accuracies, control: Accuracies | None) -> None:
        """Show the accuracies before and after, and those of the full-depth control where it is known."""
        if self._live is not None:
            self._live.stop()
        rows = {"frozen": frozen, "tuned": tuned} | ({"control": control} if control else {})
        self._print("")
        self._console.print(_table(rows, list(tuned)))
        for name, accuracy in rows.items():
            values = "  ".join(f"{domain} {_percent(value)}" for domain, value in accuracy.items())
            self._write_log(f"{name}: {_percent(mean(accuracy.values()))}  ({values})")

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    def _write_log(self, text: str) -> None:
        self._log.emit(logging.makeLogRecord({"msg": text}))


class _Shown(logging.Handler):
    """Shows what the engine is doing. Warnings have a handler of their own."""

    def __init__(self, show: Callable[[str], None]) -> None:
        super().__init__(logging.INFO)
        self._show = show

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno == logging.INFO:
            self._show(record.getMessage())


def _table(rows: Mapping[str, Accuracies], domains: list[str]) -> Table:
    table = Table("accuracy (%)", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in (*domains, "average"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, accuracy in rows.items():
        values = [accuracy[domain] for domain in domains]
        table.add_row(name, *(_percent(value) for value in (*values, mean(values))))
    return table


def _percent(accuracy: float) -> str:
    return f"{100 * accuracy:.1f}"
