"""The race: every scene's contestants in turn, in each repeat, so that what slows the machine down meets them all."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch

from benchmarks.peers.agreement import Agreement, compare, unchanged, worst_of
from benchmarks.peers.entries import FEDRA_LOOP, PEFT, PRODUCTS, Entry, by_contestant, entries
from benchmarks.peers.export import export_work
from benchmarks.peers.job import Job, work_file
from benchmarks.peers.processes import Contestant, Times
from benchmarks.peers.scenes import Scene, build_scene, make_model
from benchmarks.peers.work import State

LONGEST_ROUND = 10.0
"""Seconds of a round without work from which on a contestant is left out."""
TRIALS = 3
"""Rounds of a variant before the fastest is chosen: by a single round, noise chose one that took 1.4 times as long."""
MOST_COPIES = 1000
"""Most clients that have whole models of their own: 10,000 of the embedded model would take 16 GB."""


@dataclass
class Standing:
    """What a contestant needed in a scene.

    Attributes:
        entry: the variant in which it raced.
        attention: its implementation of attention.
        times: of its counted rounds.
        variants: CPU-seconds of the fastest of the rounds by which each of its variants was tried, by attention; empty
            if there is only one.
        agreement: of its work with the reference's, the worst of its variants and rounds; None if it trains nothing.
        skipped: why it did not race.
    """

    entry: Entry
    attention: str = ""
    times: list[Times] = field(default_factory=list)
    variants: dict[str, float] = field(default_factory=dict)
    agreement: Agreement | None = None
    skipped: str = ""

    @property
    def cpu(self) -> float:
        """Median CPU-seconds of a round."""
        return median(times.cpu for times in self.times)

    @property
    def wall(self) -> float:
        """Median wall-clock seconds of a round."""
        return median(times.wall for times in self.times)

    @property
    def spread(self) -> tuple[float, float]:
        """The least and the most CPU-seconds of a round."""
        return min(times.cpu for times in self.times), max(times.cpu for times in self.times)


class Race:
    """Keeps the contestants' processes from one scene to the next, as libraries take long to import."""

    def __init__(self, folder: Path, repeats: int) -> None:
        """Rounds are counted `repeats` times; models and what the processes print lie in `folder`."""
        self._folder, self._repeats = folder, repeats
        self._processes: dict[Entry, Contestant] = {}
        self._seconds_per_client: dict[str, float] = {}
        """Of contestants without work, in the last scene of this kind."""

    def run(self, scene: Scene) -> list[Standing]:
        """Race in a scene.

        Raises:
            ContestantError: a contestant's process has ended.
        """
        print(f"racing: {scene.title} …", file=sys.stderr, flush=True)
        skipped = [
            Standing(entry, skipped=reason) for entry in entries(scene) if (reason := self._reason(scene, entry))
        ]
        left_out = {standing.entry for standing in skipped}
        with TemporaryDirectory(dir=self._folder) as folder:
            heats = _Heats(scene, Path(folder))
            racing = [entry for entry in entries(scene) if entry not in left_out]
            # They import their libraries at the same time, and nothing is measured before all have done so.
            for contestant in [self._process(entry) for entry in racing]:
                contestant.wait_until_started()
            standings = [
                heats.choose([(entry, self._process(entry)) for entry in variants])
                for variants in by_contestant(racing)
            ]
            for _ in range(self._repeats):
                for standing in standings:
                    heats.count_round(standing, self._process(standing.entry))
            for standing in standings:
                self._process(standing.entry).end()
                if scene.idle:
                    self._seconds_per_client[standing.entry.label] = standing.wall / scene.clients
        return [*standings, *skipped]

    def close(self) -> None:
        """End all processes."""
        for process in self._processes.values():
            process.close()
        self._processes.clear()

    def _process(self, entry: Entry) -> Contestant:
        if entry not in self._processes:
            name = " ".join(["peers", entry.label, entry.dtype, entry.attention or ""]).strip()
            self._processes[entry] = Contestant(name, entry.module, entry.environment, self._folder)
        return self._processes[entry]

    def _reason(self, scene: Scene, entry: Entry) -> str:
        """Why `entry` cannot race in `scene`; empty if it can."""
        if not scene.idle:
            return ""
        if entry.label == FEDRA_LOOP and scene.clients > MOST_COPIES:
            return "left out: a model for each client takes too much memory"
        seconds = self._seconds_per_client.get(entry.label, 0.0) * scene.clients
        return f"left out: about {seconds:.0f} s a round" if seconds > LONGEST_ROUND else ""


class _Heats:
    """The rounds of a scene, all of which are checked: first one of each variant, of which the fastest are chosen."""

    def __init__(self, scene: Scene, folder: Path) -> None:
        self._scene, self._folder = scene, folder
        if scene.own_model:
            make_model(scene, folder)
        work = export_work(build_scene(scene, folder))
        work.save(work_file(folder))
        self._initial = work.state
        self._reference: State | None = None
        self._attention: dict[str, str] = {}
        """Of the fastest PEFT loop of each dtype."""

    def choose(self, variants: Sequence[tuple[Entry, Contestant]]) -> Standing:
        """Run a round of each of a contestant's variants; of several, the fastest of some more rounds stays ready."""
        several = len(variants) > 1
        checks: list[Agreement] = []
        for entry, process in variants:
            process.begin(self._job(entry))
            result = self._folder / "state.pt"
            process.round(result)
            if entry.label != PRODUCTS:
                checks.append(self._check(entry, result))
        seconds = {entry: math.inf for entry, _ in variants}
        for _ in range(TRIALS if several else 0):
            for entry, process in variants:
                seconds[entry] = min(seconds[entry], process.round().cpu)
        fastest = min(seconds, key=lambda entry: seconds[entry])
        for entry, process in variants:
            if entry != fastest:
                process.end()
        if fastest.label == PEFT:
            self._attention[fastest.dtype] = str(fastest.attention)
        tried = {str(entry.attention): took for entry, took in seconds.items()} if several else {}
        return Standing(fastest, self._attention_of(fastest), variants=tried, agreement=worst_of(checks))

    def count_round(self, standing: Standing, process: Contestant) -> None:
        """Run a round of a chosen contestant, which counts, and check it."""
        result = self._folder / "state.pt"
        standing.times.append(process.round(result))
        if standing.agreement is not None:
            standing.agreement = worst_of([standing.agreement, self._check(standing.entry, result)])

    def _check(self, entry: Entry, result: Path) -> Agreement:
        state: State = torch.load(result, weights_only=True)
        if self._scene.idle:
            return unchanged(self._initial, state)
        if self._reference is None:
            self._reference = state
        return compare(self._initial, self._reference, state, entry.dtype)

    def _attention_of(self, entry: Entry) -> str:
        return entry.attention or self._attention.get(entry.dtype, "sdpa")

    def _job(self, entry: Entry) -> Job:
        return Job(
            scene=self._scene.name,
            folder=str(self._folder),
            dtype=entry.dtype,
            attention=self._attention_of(entry),
            executor=entry.executor,
            threads=self._scene.threads,
            idle=self._scene.idle,
        )
