"""The callback that warns at the end of a run if its loss on held-out samples has risen."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fedra_engine.callback import Callback, Evaluation, Outcome
from fedra_engine.experiment import Experiment
from fedra_engine.federation.averages import average, average_measure
from fedra_engine.federation.rising_loss import BeforeAndAfter, loss_warnings
from fedra_engine.models.state import GlobalState

_LOG = logging.getLogger(__name__)


class LossWatch(Callback):
    """Logs `loss_warnings` after a run."""

    def __init__(self, earlier: Sequence[Mapping[str, Any]] = ()) -> None:
        """Watch a run; `earlier` are the records in `metrics.jsonl` of a resumed one."""
        known = {record["round"] + 1: average_measure(record, "test_loss") for record in earlier}
        self._losses = {number: value for number, value in known.items() if value is not None}

    def on_evaluate(self, experiment: Experiment, state: GlobalState, evaluation: Evaluation) -> None:
        if evaluation.metrics is not None:
            self._losses[evaluation.metrics.round + 1] = average(evaluation.measures["test_loss"])

    def on_end(self, experiment: Experiment, state: GlobalState, outcome: Outcome) -> None:
        accuracy = BeforeAndAfter(average(outcome.frozen), average(outcome.tuned))
        before, after = (average(of["test_loss"]) for of in (outcome.frozen_measures, outcome.tuned_measures))
        for text in loss_warnings(
            accuracy, BeforeAndAfter(before, after), self._losses, experiment.config.data.held_out
        ):
            _LOG.warning("%s", text)
