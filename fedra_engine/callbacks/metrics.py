"""The results of a run, round by round in `metrics.jsonl`, and all of them in `summary.json`."""

from __future__ import annotations

from statistics import mean

from fedra_engine.callback import Callback, Outcome, Round
from fedra_engine.callbacks.run_folder import RunFolder
from fedra_engine.experiment import Experiment
from fedra_engine.models.state import GlobalState


class Metrics(Callback):
    """Keeps the configuration, the record of every round, and the summary in the run's folder.

    It comes after `Checkpoints`: where metrics.jsonl has a round, there is a checkpoint of it.
    """

    def __init__(self, folder: RunFolder) -> None:
        """Write into `folder`."""
        self._folder = folder

    def on_start(self, experiment: Experiment, state: GlobalState, first_round: int) -> None:
        # A run may go on with more rounds.
        self._folder.write_config(experiment.config)

    def on_round(self, experiment: Experiment, state: GlobalState, round: Round) -> None:
        self._folder.append_metrics(round.metrics.record())

    def on_end(self, experiment: Experiment, state: GlobalState, outcome: Outcome) -> None:
        self._folder.write_summary(
            {
                "rounds": outcome.rounds,
                "frozen": outcome.frozen,
                "tuned": outcome.tuned,
                "average_frozen": mean(outcome.frozen.values()),
                "average_tuned": mean(outcome.tuned.values()),
                "exported_accuracy": outcome.exported,
                "average_exported": mean(outcome.exported.values()),
                "tuned_is": outcome.tuned_is,
                "evaluated_blocks": experiment.method.evaluated_model().blocks.tolist(),
                "caution": experiment.method.caution,
            }
        )
