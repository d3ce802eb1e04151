"""What watching a run costs beside its training: the measures, the trackers and the report, all in the same run."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

from accelerate import Accelerator

from fedra_engine import run
from fedra_engine.callbacks.trackers import Trackers
from fedra_engine.config import ExperimentConfig
from fedra_engine.execution.metrics import MetricSums
from fedra_engine.report.writer import ReportWriter
from fedra_engine.runtime.tables import PlainConsole

_IN_ROUNDS: dict[str, tuple[type, tuple[str, ...]]] = {
    "measures": (MetricSums, ("add", "merged", "values")),
    "trackers": (Trackers, ("on_evaluate", "on_round")),
}
"""What is called after rounds and evaluations, by part of the watching: a class and its methods."""
_ONCE: dict[str, tuple[type, tuple[str, ...]]] = {
    "trackers": (Trackers, ("on_start",)),
    "report": (ReportWriter, ("on_start", "on_end")),
}
"""What is called before the first round or after the last."""
_PARTS = ("measures", "trackers", "report")


@dataclass(frozen=True)
class WatchingTimes:
    """Times of a part of the watching, beside those of the training.

    Attributes:
        part: `measures`, `trackers`, `report` or `all`.
        once: CPU-seconds before the first round and after the last, imports included.
        watched: CPU-seconds of a round, with its share of the evaluations.
        round: CPU-seconds of a round, its share of the evaluations and its checkpoint, without any watching.
        rounds: that were trained.
    """

    part: str
    once: float
    watched: float
    round: float
    rounds: int

    def row(self) -> dict[str, Any]:
        """The times, and their share of a round and of all rounds."""
        whole = self.once + self.rounds * self.watched
        return {
            "part": self.part,
            "once": self.once,
            "in_a_round": self.watched,
            "a_round": self.round,
            "share_of_a_round": f"{self.watched / self.round:.2%}",
            f"with_once,_of_{self.rounds}_rounds": f"{whole / (self.rounds * self.round):.2%}",
        }


def measure_watching(config: ExperimentConfig) -> list[WatchingTimes]:
    """Train an experiment on the CPU, in a folder that is then removed. Returns the times of each part, and of all.

    What a tracker does in processes of its own is not counted.

    Raises:
        InputError: something in the configuration cannot be used.
    """
    seconds, rounds = defaultdict[tuple[str, str], float](float), config.rounds
    console = PlainConsole(quiet=True, force_terminal=False)
    with ExitStack() as timing:
        for kind, classes in (("in rounds", _IN_ROUNDS), ("once", _ONCE)):
            for part, (owner, names) in classes.items():
                for name in names:
                    timing.enter_context(_timed(owner, name, seconds, (part, kind)))
        timing.enter_context(_timed(run, "train", seconds, ("train", "in all")))
        folder = timing.enter_context(TemporaryDirectory())
        run.run(replace(config, output_dir=folder, name="run"), accelerator=Accelerator(cpu=True), console=console)
    training = seconds.pop(("train", "in all")) - sum(seconds.values())
    parts = [
        WatchingTimes(part, seconds[part, "once"], seconds[part, "in rounds"] / rounds, training / rounds, rounds)
        for part in _PARTS
    ]
    once, watched = (sum(getattr(each, name) for each in parts) for name in ("once", "watched"))
    return [*parts, replace(parts[0], part="all", once=once, watched=watched)]


@contextmanager
def _timed(
    owner: object, name: str, seconds: defaultdict[tuple[str, str], float], key: tuple[str, str]
) -> Iterator[None]:
    """Add the CPU-seconds that a function of `owner` takes to those of the `key`."""
    plain: Callable[..., Any] = getattr(owner, name)

    @wraps(plain)
    def timed(*args: Any, **kwargs: Any) -> Any:
        began = time.process_time()
        try:
            return plain(*args, **kwargs)
        finally:
            seconds[key] += time.process_time() - began

    with patch.object(owner, name, timed):
        yield
