"""Histories written by hand, told to callbacks as a run does."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from fedra_engine.callback import Callback, Evaluation, Round, Stop
from fedra_engine.config import DataConfig, ExperimentConfig
from fedra_engine.federation.records import RoundMetrics
from fedra_engine.models.state import GlobalState

MEASURES = ("accuracy", "test_loss")
HELD_OUT = ExperimentConfig(data=DataConfig(validation_fraction=0.2))


def experiment(config: ExperimentConfig = HELD_OUT) -> Any:
    """What such callbacks see of an experiment."""
    nothing = SimpleNamespace(tensors=dict)
    return SimpleNamespace(
        config=config,
        evaluator=SimpleNamespace(measures=list(MEASURES)),
        train_data=SimpleNamespace(task="image_classification"),
        method=nothing,
        server=nothing,
        more_than_exported=lambda _: None,
    )


def state_after(round: int) -> GlobalState:
    return GlobalState(torch.full((2, 3), float(round)), torch.zeros(1, 2))


def metrics(round: int, value: float | None) -> RoundMetrics:
    """Of a round whose accuracy, and negative loss, is `value` on average over two domains; None if not evaluated."""
    found = RoundMetrics(round, participants=1, samples=1, loss=1.0, lr=0.1, blocks_held=1, seconds=1.0)
    if value is not None:
        by_domain = {"a": value - 0.125, "b": value + 0.125}
        found.set_measures({"accuracy": by_domain, "test_loss": {name: -each for name, each in by_domain.items()}})
    return found


def train(callback: Callback, values: Sequence[float | None], first: int = 0, until: int | None = None) -> Stop | None:
    """Tell `callback` of the rounds from `first` on and before `until`, whose measures are `values`; until it stops."""
    nothing: Any = None
    seen = experiment()
    callback.on_start(seen, state_after(first - 1), first)
    stop = callback.on_evaluate(seen, state_after(-1), Evaluation({"a": 0.0, "b": 1.0}))
    for round, value in list(enumerate(values))[first:until]:
        if stop is not None:
            break
        state, of_round = state_after(round), metrics(round, value)
        callback.on_evaluate(seen, state, Evaluation({}, of_round))
        stop = callback.on_round(seen, state, Round(of_round, nothing, nothing, nothing))
    return stop
