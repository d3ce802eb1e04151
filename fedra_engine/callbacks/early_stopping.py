"""The callback that ends a run which no longer improves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedra_engine.callback import Callback, Evaluation, Round, Stop
from fedra_engine.callbacks.best_round import BestRound, check_measured
from fedra_engine.config import EarlyStoppingConfig, refuse_test_samples
from fedra_engine.config.validation import check_values
from fedra_engine.experiment import Experiment
from fedra_engine.models.state import GlobalState
from fedra_engine.runtime.errors import count_of
from fedra_engine.runtime.measure_text import measure_name, measure_text


class EarlyStopping(Callback):
    """Ends a run after `patience` evaluations in a row without an improvement.

    What is to improve is the average of a measure over the domains, on validation samples: without
    `data.validation_fraction` a run is refused before its first round. The first evaluation after a round is what the
    others are compared with; that of the frozen model does not count, and a value that is not defined never improves.
    """

    def __init__(
        self,
        patience: int,
        measure: str = "accuracy",
        min_improvement: float = 0.0,
        earlier: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Make it from the options of `early_stopping`, checked as these are.

        Args:
            patience: evaluations without an improvement.
            measure: a name in `metrics.jsonl`.
            min_improvement: how much better than the best one before a value must be.
            earlier: of a run that goes on, the records in `metrics.jsonl`, from which the decision is derived.
        """
        check_values(EarlyStoppingConfig(patience, measure, min_improvement))
        self._patience = patience
        self._measure = measure
        self._min_improvement = min_improvement
        self._earlier = list(earlier)
        self._best, self._waited = BestRound(measure, min_improvement), 0

    def on_start(self, experiment: Experiment, state: GlobalState, first_round: int) -> None:
        refuse_test_samples("early_stopping.patience", self._patience, experiment.config.data)
        check_measured("early_stopping.measure", self._measure, experiment)
        self._best, self._waited = BestRound(self._measure, self._min_improvement), 0
        for record in self._earlier:
            if record["round"] < first_round:
                self._see(record)

    def on_evaluate(self, experiment: Experiment, state: GlobalState, evaluation: Evaluation) -> Stop | None:
        # Before the first round, since a run that had ended may be resumed.
        return self._decision() if evaluation.metrics is None else None

    def on_round(self, experiment: Experiment, state: GlobalState, round: Round) -> Stop | None:
        # As a resumed run will: from the record, which lacks what is measured when another callback ends the run.
        self._see(round.metrics.record())
        return self._decision()

    def _see(self, record: Mapping[str, Any]) -> None:
        better = self._best.see(record)
        if better is not None:
            self._waited = 0 if better else self._waited + 1

    def _decision(self) -> Stop | None:
        if self._waited < self._patience:
            return None
        best = self._best
        value = measure_text(self._measure, best.value)
        found = "" if best.value is None else f"; the best is {value}, after round {best.round + 1}"
        # Only validation samples may decide.
        measure = measure_name(self._measure, "validation")
        return Stop(f"{measure} has not improved in {count_of(self._patience, 'evaluation')}{found}")
