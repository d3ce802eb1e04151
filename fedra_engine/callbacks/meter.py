"""Where a run is: its rounds and clients, how fast they are, and what has been measured so far."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

from fedra_engine.federation.records import RoundMetrics
from fedra_engine.runtime.measure_text import measure_text
from fedra_engine.runtime.stages import LOCAL_STEPS, Stage

_SECONDS_BETWEEN_LOSSES = 1.0
"""Reading a loss waits for the GPU, which is then idle."""


class Meter:
    """Counts rounds, clients and samples, and times them; `clock` returns seconds.

    Attributes:
        rounds, rounds_done: of the whole run, those of earlier processes included.
        in_round: whether a round has begun and is not over; its number, from 1, is `rounds_done + 1`.
        expected: most clients that a round can have; 0 if that is not known.
        participants: clients that train in the round; until the first have finished, `expected`.
        clients: those that have finished it.
        loss: the latest mean training loss, which may be of a part of a round.
        speed: samples per second of the last round, or of the part of the first one that is done; 0 if nobody trained.
        losses: mean training loss of every round in which anybody trained.
        frozen: accuracy by domain before the first round; empty until it is known.
        evaluations: the same after rounds, oldest first.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.rounds = self.rounds_done = 0
        self.in_round = False
        self.expected = self.participants = self.clients = 0
        self.loss: float | None = None
        self.losses = list[float]()
        self.frozen: Mapping[str, float] = {}
        self.evaluations = list[Mapping[str, float]]()
        self.speed = 0.0
        self._loss_read = -math.inf
        self._first_round = 0
        self._part = 0.0
        self._began: float | None = None
        self._round_began = 0.0

    def remember(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Take over the losses and accuracies of earlier rounds from their lines in `metrics.jsonl`."""
        self.losses = [record["loss"] for record in records if record["loss"] is not None]
        self.loss = self.losses[-1] if self.losses else None
        self.evaluations = [record["accuracy"] for record in records if "accuracy" in record]

    def round_started(self, round: int, rounds: int) -> None:
        """Start the counts of `round` (from 0) of `rounds`; the number of its participants is set later."""
        self._round_began = self._clock()
        if self._began is None:
            self._began, self._first_round = self._round_began, round
        self.rounds, self.rounds_done, self.in_round = rounds, round, True
        self.participants, self.clients, self._part = self.expected, 0, 0.0

    def trained(self, clients: int, samples: int, loss: Callable[[], float | None]) -> None:
        """Set how many clients of the round have trained, on how many samples; `loss` reads their mean loss."""
        self.clients = clients
        now = self._clock()
        if now - self._loss_read >= _SECONDS_BETWEEN_LOSSES:
            self.loss, self._loss_read = loss(), now
        if self.rounds_done == self._first_round:
            # A part of a round looks slow, as clients that are still being trained do not count.
            self._set_speed(samples, now - self._round_began)

    def round_finished(self, metrics: RoundMetrics) -> None:
        """Set the counts to those of all processes."""
        self.loss, self.clients, self.in_round = metrics.loss, metrics.participants, False
        self._set_speed(metrics.samples, metrics.seconds)
        if metrics.loss is not None:
            self.losses.append(metrics.loss)
        self.rounds_done += 1

    def _set_speed(self, samples: int, seconds: float) -> None:
        self.speed = samples / seconds if seconds else 0.0

    def round_text(self) -> str:
        """Rounds done, as in `3/60`."""
        return f"{self.rounds_done:>{len(str(self.rounds))}}/{self.rounds}"

    def loss_text(self) -> str:
        """The latest loss."""
        return measure_text("loss", self.loss)

    def speed_text(self) -> str:
        """The `speed` with its unit."""
        return f"{self.speed:,.0f} samples/s"

    def part_of_round(self, stage: Stage | None) -> float:
        """The share of the present round's local steps that is done (0 to 1), as far as a running `stage` tells."""
        if stage is not None and stage.what == LOCAL_STEPS and stage.total:
            # What comes after the local steps is short.
            self._part = max(self._part, stage.done / stage.total)
        return self._part

    def time_left(self, part: float = 0.0) -> str:
        """The time left at the pace so far, when `part` (0 to 1) of the present round is done."""
        done = self.rounds_done - self._first_round + (part if self.in_round else 0.0)
        if self._began is None or not done:
            return "-:--:--"
        left = self.rounds - self._first_round - done
        return str(timedelta(seconds=round((self._clock() - self._began) / done * left)))

    def status_text(self) -> str:
        """Loss, clients, speed, and the time left."""
        return f"loss {self.loss_text()}  {self.clients} clients  {self.speed_text()}  ETA {self.time_left()}"
