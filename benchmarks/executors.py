"""Sweep against one client after another, on the same work in the same run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any

from benchmarks.floor import frozen_products_seconds
from benchmarks.handwritten import HandwrittenExecutor
from benchmarks.settings import Setting
from fedra_engine.execution.executor import Executor
from fedra_engine.execution.sequential import SequentialExecutor
from fedra_engine.federation.aggregation import Aggregator
from fedra_engine.models.state import GlobalState


@dataclass(frozen=True)
class ExecutorTimes:
    """CPU-seconds of one round (medians over repeats) and what follows from them.

    Attributes:
        setting: the work.
        sequential: a PEFT sub-model built for every client.
        handwritten: a loop over cached sub-models without PEFT.
        sweep: the engine.
        floor: the frozen products alone.
        largest_difference: largest difference between the global adapters of sweep and sequential.
    """

    setting: str
    sequential: float
    handwritten: float
    sweep: float
    floor: float
    largest_difference: float

    def row(self) -> dict[str, Any]:
        """The fields and the ratios."""
        return asdict(self) | {
            "sequential_over_sweep": self.sequential / self.sweep,
            "handwritten_over_sweep": self.handwritten / self.sweep,
            "sweep_over_floor": self.sweep / self.floor,
        }


def measure_executors(setting: Setting, repeats: int) -> ExecutorTimes:
    """Time the executors in turn, `repeats` times, after one round of each that is not counted."""
    executors: dict[str, Executor] = {
        "sequential": SequentialExecutor(setting.foundation, setting.samples, setting.lora),
        "sweep": setting.sweep(),
    }
    handwritten = HandwrittenExecutor(setting.foundation, setting.samples)
    timed: dict[str, Callable[[], float]] = {
        name: partial(_round_seconds, executor, setting)
        for name, executor in (executors | {"handwritten": handwritten}).items()
    }
    timed["floor"] = partial(frozen_products_seconds, setting)
    results = {name: run_round(executor, setting)[1] for name, executor in executors.items()}
    difference = (results["sweep"].adapters - results["sequential"].adapters).abs().max()
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    # The first of the hand-written loop and of the floor warm them up; the others ran above.
    for warm_up in ("handwritten", "floor"):
        timed[warm_up]()
    for _ in range(repeats):
        for name, run in timed.items():
            seconds[name].append(run())
    return ExecutorTimes(
        setting=setting.name,
        largest_difference=float(difference),
        **{name: median(values) for name, values in seconds.items()},
    )


def run_round(executor: Executor, setting: Setting) -> tuple[float, GlobalState]:
    """Train and aggregate one round. Returns its CPU-seconds and the new global state."""
    started = time.process_time()
    aggregator = Aggregator(setting.state)
    for updates in executor.train(setting.work, setting.assignment, setting.state):
        aggregator.add(updates)
    result = aggregator.result()
    return time.process_time() - started, result


def _round_seconds(executor: Executor, setting: Setting) -> float:
    return run_round(executor, setting)[0]
