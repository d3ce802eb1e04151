"""How far a run is and how fast it goes, in numbers and as bars."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from datetime import timedelta

from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedra_engine.federation.records import RoundMetrics
from fedra_engine.runtime.tables import PlainConsole

REFRESHES_PER_SECOND = 2
"""Drawing takes milliseconds of the processor that trains."""
SECONDS_BETWEEN_LOSSES = 1.0
"""To read a loss is to wait for the GPU, which then has nothing to do."""
BAR_WIDTH = 32


class Meter:
    """Counts rounds, clients and samples, and measures the time they take."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        """`clock` returns seconds."""
        self._clock = clock
        self.rounds = 0
        self.rounds_done = 0
        self.participants = 0
        self.clients = 0
        self._loss = math.nan
        self._samples = 0
        self._first_round = 0
        self._began: float | None = None
        self._round_began = 0.0
        self._round_seconds = 0.0
        self._loss_read = -math.inf

    def round_started(self, round: int, rounds: int) -> None:
        """Count from nothing again; how many participants there are is known later."""
        now = self._clock()
        if self._began is None:
            self._began, self._first_round = now, round
        self.rounds, self.rounds_done, self.participants = rounds, round, 0
        self.clients, self._samples = 0, 0
        self._round_began = now

    def trained(self, clients: int, samples: int, loss: Callable[[], float | None]) -> None:
        """The clients of the round that have trained so far, their samples, and what gives their mean loss."""
        self.clients, self._samples = clients, samples
        now = self._clock()
        if now - self._loss_read >= SECONDS_BETWEEN_LOSSES:
            self._show_loss(loss())
            self._loss_read = now
        self._round_seconds = now - self._round_began

    def round_finished(self, metrics: RoundMetrics) -> None:
        """Count the round, as it was on all processes."""
        self._show_loss(metrics.loss)
        self.clients, self._samples = metrics.participants, metrics.samples
        self.rounds_done += 1
        self._round_seconds = metrics.seconds

    def round_text(self) -> str:
        """`3/60`."""
        return f"{self.rounds_done:>{len(str(self.rounds))}}/{self.rounds}"

    def status_text(self) -> str:
        """Loss, speed and remaining time."""
        speed = self._samples / self._round_seconds if self._round_seconds else 0.0
        loss = "–" if math.isnan(self._loss) else f"{self._loss:.4f}"
        return f"loss {loss}  {self.clients} clients  {speed:,.0f} samples/s  ETA {self._eta()}"

    def _show_loss(self, loss: float | None) -> None:
        self._loss = math.nan if loss is None else loss

    def _eta(self) -> str:
        """Time that the remaining rounds take if they are like those of this process."""
        done = self.rounds_done - self._first_round
        if self._began is None or done == 0:
            return "-:--:--"
        seconds = (self._clock() - self._began) / done * (self.rounds - self.rounds_done)
        return str(timedelta(seconds=round(seconds)))


def live_progress(console: PlainConsole, meter: Meter) -> Live:
    """Bars of the rounds and of the round's clients on a terminal, drawn at intervals from what `meter` then shows."""

    def draw() -> RenderableType:
        bars = Table.grid(padding=(0, 1))
        for name, done, total in (
            ("rounds", meter.rounds_done, meter.rounds),
            ("clients", meter.clients, meter.participants),
        ):
            bars.add_row(name, ProgressBar(total=total or 1, completed=done, width=BAR_WIDTH), f"{done}/{total or '?'}")
        return Group(bars, Text(meter.status_text()))

    return Live(console=console, get_renderable=draw, refresh_per_second=REFRESHES_PER_SECOND, transient=True)
