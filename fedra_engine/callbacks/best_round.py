"""The best round by a measure, as far as its records tell: what `early_stopping` and `keep_best` go by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedra_engine.execution.metrics import is_better
from fedra_engine.experiment import Experiment
from fedra_engine.federation.averages import average_measure
from fedra_engine.runtime.errors import InputError


@dataclass
class BestRound:
    """The best of the evaluated rounds whose records it was shown.

    Attributes:
        measure: a name in `metrics.jsonl`, of which the average over the domains counts.
        by: how much better than the best one before a value must be.
        value: the best one; None before the first.
        round: that has it, from 0.
    """

    measure: str
    by: float = 0.0
    value: float | None = None
    round: int = -1

    def see(self, record: Mapping[str, Any]) -> bool | None:
        """Whether the round of a `record` is the best so far; None if it was not evaluated."""
        value = average_measure(record, self.measure)
        if value is None:
            return None
        better = is_better(self.measure, value, self.value, by=self.by)
        if better:
            self.value, self.round = value, record["round"]
        return better


def check_measured(option: str, measure: str, experiment: Experiment) -> None:
    """Raise InputError if the experiment's evaluations do not have the `measure` that an option names."""
    measures = experiment.evaluator.measures
    if measure not in measures:
        task = experiment.train_data.task
        raise InputError(f"{option}: found {measure} with a task of {task}, expected one of {', '.join(measures)}")
