"""The runs of an accuracy study, one a method, that take turns."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from accelerate import Accelerator

from fedra_engine.callback import Callbacks, Round
from fedra_engine.callbacks.checkpoint import RunWriter, find_start
from fedra_engine.callbacks.console import Console
from fedra_engine.callbacks.fingerprint import fingerprint
from fedra_engine.callbacks.run_folder import RunFolder
from fedra_engine.config import ExperimentConfig
from fedra_engine.data.domain_data import DomainData
from fedra_engine.experiment import Inputs, build_experiment
from fedra_engine.runtime.processes import Processes
from fedra_engine.runtime.tables import PlainConsole
from fedra_engine.simulation import evaluate, train_round


class StudyRun:
    """One method with one seed, in a run folder."""

    def __init__(
        self, config: ExperimentConfig, folder: Path, data: DomainData, log: Path, accelerator: Accelerator
    ) -> None:
        """Go on after the newest checkpoint in `folder`, if there is one.

        Raises:
            InputError: the experiment cannot be built, or all checkpoints are damaged.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.method = config.method.name
        self.stopped = ""
        """Why it cannot go on; empty while it can."""
        self._rounds = config.rounds
        self._folder = RunFolder(folder)
        self._name = f"{self.method}, seed {config.seed}"
        self._console = Console(log, PlainConsole(quiet=True, force_terminal=False))
        self.experiment = build_experiment(
            config, accelerator.device, Processes.of(accelerator), inputs=Inputs(data=data)
        )
        """What is trained."""
        begun = fingerprint(self.experiment)
        start = find_start(self.experiment, self._folder, begun)
        self._keeper = RunWriter(self._folder, begun, start)
        self._keeper.rewind()
        self.rounds, self._state = start.round, start.state
        self._unsaved: list[Round] = []
        self._seconds: list[float] = []
        self.pause_seconds = 0.0
        """What evaluating and saving took last time, or is expected to take."""

    @property
    def records(self) -> list[dict[str, Any]]:
        """`RoundMetrics` of every round in the newest checkpoint."""
        return self._folder.read_metrics()

    @property
    def round_seconds(self) -> float | None:
        """What a round takes, without the first of this process, which may compile; None before there are others."""
        return median(self._seconds[1:]) if len(self._seconds) > 1 else None

    @property
    def unsaved(self) -> int:
        """Rounds after the newest checkpoint."""
        return len(self._unsaved)

    def forget_unsaved(self) -> None:
        """Drop the rounds after the newest checkpoint. This run cannot go on then; one built anew can."""
        self.rounds -= len(self._unsaved)
        self._unsaved.clear()

    def advance(self, target: int, deadline: float) -> None:
        """Train up to `target` rounds in all, as many as begin before `deadline`.

        Raises:
            InputError: training diverged; what was saved before stays.
        """
        self._console.message(self._name)
        listeners = Callbacks(self.experiment, [self._console])
        for round in range(self.rounds, min(target, self._rounds)):
            if time.monotonic() >= deadline:
                break
            self._console.begin_round(round, self._rounds)
            self._state, record = train_round(self.experiment, self._state, round, listeners)
            listeners.call("on_round", self._state, record)
            self._seconds.append(record.metrics.seconds)
            self._unsaved.append(record)
            self.rounds += 1

    def save(self) -> None:
        """Evaluate the newest round and write a checkpoint of it, if there is none yet."""
        if not self._unsaved:
            return
        started = time.monotonic()
        last = self._unsaved[-1]
        last.metrics.accuracy = evaluate(self.experiment, self._state)
        self._unsaved[-1] = replace(last, accuracy=last.metrics.accuracy)
        self._keeper.save(self.experiment, self._state, self._unsaved)
        self._unsaved.clear()
        self.pause_seconds = time.monotonic() - started


def next_target(runs: Sequence[StudyRun], *, slice: int, rounds: int, seconds: float) -> int:
    """Up to how many rounds the next turn of all runs should go, so that it ends within `seconds`.

    That is the next multiple of `slice`, or fewer where that would take too long; the rounds that all runs have if not
    even one more fits. Before a process knows what rounds take, it is one more.
    """
    going = [run for run in runs if not run.stopped]
    least = min((run.rounds for run in going), default=rounds)
    if least >= rounds or seconds <= 0:
        return least
    if any(run.round_seconds is None for run in going):
        return least + 1
    full = min((least // slice + 1) * slice, rounds)
    seconds -= sum(run.pause_seconds for run in going)

    def fits(target: int) -> bool:
        return sum(max(target - run.rounds, 0) * (run.round_seconds or 0.0) for run in going) <= seconds

    return next(target for target in range(full, least - 1, -1) if target == least or fits(target))
