"""Checkpoints and what else a run writes (`RunWriter`), and how a run goes on from one (`find_start`)."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from statistics import mean
from typing import Any, NamedTuple

from torch import Tensor

from fedra_engine.callback import Callback, Evaluation, Outcome, Round
from fedra_engine.callbacks.fingerprint import Fingerprint, check_fingerprint, fingerprint
from fedra_engine.callbacks.run_folder import ADAPTERS, RunFolder
from fedra_engine.callbacks.saved_rounds import Checkpoint, load_best, load_newest_intact, save_checkpoint
from fedra_engine.experiment import Experiment
from fedra_engine.exports.adapter_files import export
from fedra_engine.federation.averages import average, finite, finite_values
from fedra_engine.models.state import GlobalState, block_changes
from fedra_engine.runtime.errors import InputError

_LOG = logging.getLogger(__name__)


class RunWriter(Callback):
    """Writes every round's checkpoint, then its record, and at the end the adapter, then the summary."""

    def __init__(self, folder: RunFolder, begun: Fingerprint, start: Start) -> None:
        """Write into `folder` what follows on `start`; every checkpoint holds `begun`, the experiment's fingerprint."""
        self._folder = folder
        self._begun = begun
        self._start = start

    def on_evaluate(self, experiment: Experiment, state: GlobalState, evaluation: Evaluation) -> None:
        if evaluation.metrics is None:
            # Not in `on_start`, in which another callback may refuse to go on.
            self.rewind()
            # A run may go on with more rounds, and has measured what `auto` stands for.
            self._folder.write_config(experiment.config)

    def rewind(self) -> None:
        """Remove what `folder` has of the rounds that follow, and restore damaged records; before `save`."""
        if self._folder.rewind(self._start.round - 1, self._start.metrics):
            _LOG.info("restored %s from %s", self._folder.metrics_file, self._folder.kept_metrics_file)

    def on_round(self, experiment: Experiment, state: GlobalState, round: Round) -> None:
        self.save(experiment, state, [round])

    def save(self, experiment: Experiment, state: GlobalState, rounds: Sequence[Round]) -> None:
        """Save the `state` after the last of `rounds`, and the records of all of them."""
        last, records = rounds[-1], [each.metrics.record() for each in rounds]
        remembered = {
            "accuracy": dict(last.accuracy),
            "fingerprint": self._begun,
            "lanes": list(last.lanes),
            "metrics": self._folder.keep_metrics(*records),
        }
        save_checkpoint(self._folder.path, last.metrics.round, tensors_of(experiment, state), remembered)
        self._folder.append_metrics(*records)

    def on_end(self, experiment: Experiment, state: GlobalState, outcome: Outcome) -> None:
        export(self._folder.path / ADAPTERS, experiment, state, outcome)
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
                "measured_on": f"{experiment.config.data.held_out} samples",
                "evaluated_blocks": experiment.method.evaluated_model().blocks.tolist(),
                "block_changes": _changes(experiment, state),
                "caution": experiment.method.caution,
                "measures": _measures(outcome),
                **(_best(self._folder) if experiment.config.keep_best else {}),
                **({} if outcome.stopped is None else {"stopped": outcome.stopped}),
            }
        )


def tensors_of(experiment: Experiment, state: GlobalState) -> dict[str, Tensor]:
    """All tensors of a run after a round whose result is `state`, by name, for a checkpoint."""
    parts = {"state": state.tensors(), "method": experiment.method.tensors(), "server": experiment.server.tensors()}
    return {f"{part}.{name}": tensor for part, named in parts.items() for name, tensor in named.items()}


def _best(folder: RunFolder) -> dict[str, Any]:
    """What the summary has of the best round; nothing if no round was evaluated, or the best one is damaged."""
    try:
        found = load_best(folder)
    except InputError as error:
        _LOG.warning("keep_best: the summary does without the best round: %s", error)
        return {}
    if found is None:
        return {}
    return {"best": {"round": found.round, **{name: found.state[name] for name in ("measure", "value", "accuracy")}}}


def _measures(outcome: Outcome) -> dict[str, dict[str, Any]]:
    """The measures beside the accuracy, as the summary has them: by name, and then as the accuracies are there."""
    found = dict[str, dict[str, Any]]()
    for when, measures in (("frozen", outcome.frozen_measures), ("tuned", outcome.tuned_measures)):
        for name, of_domain in measures.items():
            values = {when: finite_values(of_domain), f"average_{when}": finite(average(of_domain))}
            found.setdefault(name, {}).update(values)
    found.pop("accuracy", None)
    return found


def _changes(experiment: Experiment, state: GlobalState) -> list[float] | None:
    """`block_changes` of a run; None if clients keep some of what they learn to themselves."""
    if experiment.method.personal_states(state) is not None:
        return None
    return block_changes(state, experiment.initial_state, experiment.foundation.adapter_layout).tolist()


class Start(NamedTuple):
    """Where a run begins or goes on.

    Attributes:
        round: the next one, from 0.
        state: before that round.
        accuracy: by domain, at the latest evaluation of a trained state; empty before the first.
        metrics: on the main process of a run that trains, the lines of the earlier rounds in `metrics.jsonl`.
    """

    round: int
    state: GlobalState
    accuracy: dict[str, float]
    metrics: bytes = b""

    @property
    def records(self) -> list[dict[str, Any]]:
        """The records in `metrics`, oldest first."""
        return [json.loads(line) for line in self.metrics.splitlines()]


def find_start(experiment: Experiment, folder: RunFolder, begun: Fingerprint) -> Start:
    """Restore the run in `folder` from its newest intact checkpoint, if it has one; all processes call this together.

    The folder is not changed (`RunWriter.rewind` does so).

    Args:
        experiment: newly built; its method, server and lanes are restored.
        folder: of the run.
        begun: fingerprint of `experiment`.

    Raises:
        InputError: the run began with another fingerprint, or is damaged.
    """
    processes, found, metrics = experiment.processes, None, b""
    with processes.raise_on_all():
        if processes.is_main:
            found, metrics = find_checkpoint(folder, begun, experiment.config.rounds)
            if found is not None and found.passed_over:
                _LOG.info("passed over a damaged checkpoint: %s", found.passed_over)
    found = processes.broadcast_object(found)
    if found is None:
        return Start(0, experiment.initial_state, {})
    execution, lanes = experiment.config.execution, found.state["lanes"]
    if execution.deterministic and execution.executor == "sweep" and len(lanes) == processes.count:
        # Another number of lanes, as memory would allow today, gives other roundings.
        experiment.executor.lanes = lanes[processes.index]
        if processes.is_main:
            _LOG.info("lanes: %s, as before (execution.deterministic)", ", ".join(map(str, lanes)))
    return _restore(experiment, found)._replace(metrics=metrics)


def find_checkpoint(folder: RunFolder, begun: Fingerprint, rounds: int) -> tuple[Checkpoint | None, bytes]:
    """Read the newest intact checkpoint, if any, and the records up to it.

    Raises InputError if the run has trained `rounds` already, or began with something else than `begun`.
    """
    found = load_newest_intact(folder.path)
    if found is not None:
        # Before the settings, of which the number of rounds may be one.
        if rounds <= found.round:
            raise InputError(f"rounds: found {rounds}, expected at least the {found.round + 1} done in {folder.path}")
        check_fingerprint(begun, found.state["fingerprint"], folder.path)
    return found, folder.find_metrics(None if found is None else found.state["metrics"])


def restore_newest(experiment: Experiment, folder: RunFolder) -> Start:
    """Restore a newly built `experiment` from the newest intact checkpoint; InputError if none fits."""
    found = load_newest_intact(folder.path)
    if found is None:
        raise InputError(f"{folder.path}: found no checkpoint, expected a run that has trained a round")
    check_fingerprint(fingerprint(experiment), found.state["fingerprint"], folder.path)
    return _restore(experiment, found)


def kept_best(folder: RunFolder) -> Checkpoint:
    """The best round of a run as `keep_best` has kept it; InputError if it has not, or it is damaged."""
    found = load_best(folder)
    if found is None:
        raise InputError(f"{folder.best_folder}: found no round, expected one of a run that had keep_best")
    return found


def restore_best(experiment: Experiment, folder: RunFolder) -> Start:
    """Restore a newly built `experiment` from the round that `keep_best` kept; InputError if none fits."""
    found = kept_best(folder)
    check_fingerprint(fingerprint(experiment), found.state["fingerprint"], folder.path)
    return _restore(experiment, found)


def _restore(experiment: Experiment, found: Checkpoint) -> Start:
    parts: dict[str, dict[str, Tensor]] = {"method": {}, "server": {}}
    for key, tensor in found.tensors.items():
        part, _, name = key.partition(".")
        parts.setdefault(part, {})[name] = tensor
    experiment.method.restore(parts["method"])
    experiment.server.restore(parts["server"])
    return Start(found.round + 1, experiment.initial_state.restored(parts["state"]), found.state["accuracy"])
