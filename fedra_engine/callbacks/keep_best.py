"""The callback that keeps the best round's state and adapter."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedra_engine.callback import Callback, Evaluation, Outcome, Round
from fedra_engine.callbacks.best_round import BestRound, check_measured
from fedra_engine.callbacks.checkpoint import tensors_of
from fedra_engine.callbacks.fingerprint import Fingerprint
from fedra_engine.callbacks.saved_rounds import load_round, round_folder, save_round, saved_rounds
from fedra_engine.config import EarlyStoppingConfig, refuse_test_samples
from fedra_engine.config.validation import check_values
from fedra_engine.experiment import Experiment
from fedra_engine.exports.adapter_files import export
from fedra_engine.models.state import GlobalState
from fedra_engine.runtime.errors import InputError
from fedra_engine.runtime.measure_text import measure_name, measure_text

_LOG = logging.getLogger(__name__)
_KEPT = 2
"""While a run goes on, the second best stays, in case the newest checkpoint is damaged and its round is repeated."""


class KeepBest(Callback):
    """Keeps the evaluated round in which a measure, averaged over the domains, is best on validation samples.

    `<folder>/round_0012` gets the adapter in PEFT's format and what a checkpoint has. It appears whole, after a round
    that is better than those before; of several, the last is the best. What the folder has of rounds that a run has not
    trained yet is removed. If the best round so far is lost, a warning says so, and only a better one is kept. Without
    `data.validation_fraction` a run is refused before its first round.
    """

    def __init__(
        self,
        folder: Path | str,
        measure: str = "accuracy",
        fingerprint: Fingerprint | None = None,
        earlier: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Keep rounds in `folder`, which need not exist.

        Args:
            folder: for these alone.
            measure: a name in `metrics.jsonl`.
            fingerprint: of the experiment; `fedra evaluate --best` needs it.
            earlier: of a run that goes on, the records in `metrics.jsonl`, which say what the best round so far is.
        """
        check_values(EarlyStoppingConfig(measure=measure))
        self._folder = Path(folder)
        self._measure = measure
        self._begun = dict(fingerprint or {})
        self._earlier = list(earlier)
        self._frozen: Mapping[str, float] = {}
        self._best = BestRound(measure)
        self._outdated: list[tuple[Path, str]] = []

    def on_start(self, experiment: Experiment, state: GlobalState, first_round: int) -> None:
        refuse_test_samples("keep_best", self._measure, experiment.config.data)
        check_measured("keep_best", self._measure, experiment)
        self._best, self._outdated = BestRound(self._measure), []
        for record in self._earlier:
            if record["round"] < first_round:
                self._best.see(record)
        found = dict(saved_rounds(self._folder))
        for round, path in found.items():
            if round >= first_round:
                self._outdated.append((path, "to be trained again"))
            elif round > self._best.round or self._best.round not in found:
                # The newest would pass for the best.
                self._outdated.append((path, "not the best"))
        if self._best.value is not None:
            self._warn_if_lost(self._best.round)

    def on_evaluate(self, experiment: Experiment, state: GlobalState, evaluation: Evaluation) -> None:
        if evaluation.metrics is None:
            self._frozen = evaluation.accuracy
            # Not in `on_start`, in which another callback may refuse to go on.
            for path, why in self._outdated:
                _LOG.info("removed %s, which is %s", path, why)
                shutil.rmtree(path)

    def on_round(self, experiment: Experiment, state: GlobalState, round: Round) -> None:
        accuracy = round.metrics.accuracy
        if accuracy is None or not self._best.see(round.metrics.record()):
            return
        more = experiment.more_than_exported(state)
        exported = accuracy if more is None else {}
        outcome = Outcome(round.metrics.round + 1, self._frozen, accuracy, exported, more)
        save_round(
            self._folder,
            round.metrics.round,
            tensors_of(experiment, state),
            {"measure": self._measure, "value": self._best.value, "accuracy": accuracy, "fingerprint": self._begun},
            kept=_KEPT,
            write_more=lambda made: export(made, experiment, state, outcome, best_by=self._measure),
        )

    def on_end(self, experiment: Experiment, state: GlobalState, outcome: Outcome) -> None:
        for _, path in saved_rounds(self._folder)[:-1]:
            shutil.rmtree(path)

    def _warn_if_lost(self, round: int) -> None:
        """Warn if what was kept of the best `round` so far cannot be read."""
        try:
            load_round(round, round_folder(self._folder, round))
        except InputError as error:
            _LOG.warning(
                "keep_best: round %d, the best so far with %s %s, is lost, and only a better one will be kept: %s",
                *(
                    round + 1,
                    measure_name(self._measure, "validation"),
                    measure_text(self._measure, self._best.value),
                    error,
                ),
            )
