"""What a run prints: a live display in a terminal, plain lines elsewhere, and all of it in a log."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from statistics import mean
from types import TracebackType
from typing import Any, Self

from fedra_engine.callbacks.progress import LiveProgress, Meter
from fedra_engine.config import ExperimentConfig
from fedra_engine.runtime.errors import PrintableFormatter, count_of, printable
from fedra_engine.runtime.files import writing
from fedra_engine.runtime.stages import Stage
from fedra_engine.runtime.tables import PlainConsole, rich_table, table_text

Accuracies = Mapping[str, float]
"""Top-1 accuracy (0…1) by domain."""
_ENGINE_LOG = logging.getLogger("fedra_engine")
"""Receives the warnings of every part of the engine."""


class _LogFile(logging.FileHandler):
    """Raises what keeps it from writing, which its base class prints with a traceback."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Pass on the exception that `emit`, which calls this from its `except` block, is handling.

        Raises:
            OSError: names the file.
        """
        with writing(Path(self.baseFilename)):
            raise


class Reporter:
    """Shows how a run goes; a context manager that owns the live display and the log file.

    While it is entered, the log file gets the engine's warnings, too, and console and log say what takes long.
    """

    def __init__(self, log_file: Path | None, console: PlainConsole | None = None) -> None:
        """Append to `log_file`, if any; write to `console`, which is stdout if not given."""
        self._console = PlainConsole() if console is None else console
        self._log = logging.NullHandler() if log_file is None else _LogFile(log_file, encoding="utf-8")
        self._log.setFormatter(PrintableFormatter("%(asctime)s  %(message)s"))
        self._warning_handlers: list[logging.Handler] = [] if log_file is None else [self._log]
        self._meter = Meter()
        self._live = LiveProgress(self._console, self._meter) if self._console.is_terminal else None
        self._round = Stage("")

    @classmethod
    def silent(cls) -> Reporter:
        """Prints and writes nothing: for all processes of a job but the main one."""
        return cls(None, PlainConsole(quiet=True, force_terminal=False))

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
        for handler in self._warning_handlers:
            _ENGINE_LOG.removeHandler(handler)
        _ENGINE_LOG.setLevel(self._level)
        # A disk that is full, or gone, is what may have stopped the run.
        with suppress(OSError) if error is not None else nullcontext():
            if error is not None:
                self._write_log(f"stopped: {type(error).__name__}: {error}".removesuffix(": "))
            self._log.close()

    def start(self, config: ExperimentConfig, facts: Mapping[str, str | int | float]) -> None:
        """Show what the experiment consists of, each fact under its name."""
        facts = {"method": f"{config.method.name}, {count_of(config.rounds, 'round')}, seed {config.seed}", **facts}
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
        left_out = f"  {record['bad_updates']} left out" if record.get("bad_updates") else ""
        line = f"round {self._meter.round_text()}  {self._meter.status_text()}{left_out}"
        if self._live is None:
            self._print(line)
        self._write_log(f"{line}  {dict(record)}")

    def evaluating(self, samples: int) -> None:
        """An evaluation on `samples` samples begins, which may take a while."""
        self._print(f"evaluating on {samples:,} test samples …")

    def evaluated(self, round: int, accuracy: Accuracies) -> None:
        """The global model after `round` has this accuracy."""
        self.message(f"accuracy after round {round + 1}: {_accuracy_text(accuracy)}")

    def finished(self, frozen: Accuracies, tuned: Accuracies) -> None:
        """Show the accuracies before and after."""
        if self._live is not None:
            self._live.stop()
        rows = {"frozen": frozen, "tuned": tuned}
        self._print("")
        body = [
            [name, *(_percent(accuracy[domain]) for domain in tuned), _percent(mean(accuracy.values()))]
            for name, accuracy in rows.items()
        ]
        self._print(table_text(rich_table([["accuracy (%)", *tuned, "average"], *body])))
        for name, accuracy in rows.items():
            self._write_log(f"{name}: {_accuracy_text(accuracy)}")

    def _print(self, text: str) -> None:
        self._console.print(text, soft_wrap=True)

    def _write_log(self, text: str) -> None:
        self._log.emit(logging.makeLogRecord({"msg": text}))


def _accuracy_text(accuracy: Accuracies) -> str:
    by_domain = "  ".join(f"{printable(domain)} {_percent(value)}" for domain, value in accuracy.items())
    return f"{_percent(mean(accuracy.values()))}  ({by_domain})"


class _Shown(logging.Handler):
    """Shows what the engine is doing. Warnings have a handler of their own."""

    def __init__(self, show: Callable[[str], None]) -> None:
        super().__init__(logging.INFO)
        self._show = show

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno == logging.INFO:
            self._show(record.getMessage())


def _percent(accuracy: float) -> str:
    return f"{100 * accuracy:.1f}"
