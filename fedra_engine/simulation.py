"""The round loop: sample, assign, train, aggregate, evaluate. It reads like the paper's algorithm."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from fedra_engine.callback import Callback, Callbacks, Evaluation, Outcome, Round, Update
from fedra_engine.execution.evaluation import Score, accuracies, measures
from fedra_engine.experiment import Experiment
from fedra_engine.federation.aggregation import Aggregator
from fedra_engine.federation.records import (
    MOST_RECORDED,
    ReturnedUpdates,
    RoundMetrics,
    Tally,
    check_finite,
    check_updates,
)
from fedra_engine.models.state import EvaluatedModel, GlobalState


def train(
    experiment: Experiment,
    state: GlobalState,
    first_round: int = 0,
    callbacks: Sequence[Callback] = (),
    accuracy: Mapping[str, float] | None = None,
) -> tuple[GlobalState, Outcome]:
    """Train from `first_round` to the last round, or until a callback returns `Stop`; all processes call this together.

    Args:
        experiment: the experiment.
        state: the global state before `first_round`, which counts from 0.
        callbacks: watch the run.
        accuracy: by domain, at the last evaluation before `first_round`, if there was one.

    Returns:
        The final state and the run's results.

    Raises:
        InputError: training diverged, or a callback raised it.
    """
    config, listeners = experiment.config, Callbacks(experiment, callbacks)
    latest, evaluated, done = dict(accuracy or {}), False, first_round
    listeners.call("on_start", state, first_round)
    # Clients have no models of their own yet.
    frozen = measures(experiment.evaluator.scores(experiment.initial_state, experiment.method.evaluated_model()))
    stop = listeners.call("on_evaluate", experiment.initial_state, Evaluation(frozen["accuracy"], None, frozen))
    for round in range(first_round, config.rounds):
        if stop is not None:
            break
        state, finished = train_round(experiment, state, round, listeners)
        done = round + 1
        evaluated = done % config.evaluate_every == 0 or done == config.rounds
        if evaluated:
            tuned = measures(score(experiment, state))
            latest = tuned["accuracy"]
            finished.metrics.set_measures(tuned)
            stop = listeners.call("on_evaluate", state, Evaluation(latest, finished.metrics, tuned))
        stop = listeners.call("on_round", state, replace(finished, accuracy=latest)) or stop
    if not evaluated:
        # A callback stopped the run between evaluations, or no round was left to train.
        tuned = measures(score(experiment, state))
        if done > first_round:
            listeners.call("on_evaluate", state, Evaluation(tuned["accuracy"], finished.metrics, tuned))
    more = experiment.more_than_exported(state)
    last_exit_alone = EvaluatedModel(experiment.method.evaluated_model().blocks)
    exported = tuned["accuracy"] if more is None else accuracies(experiment.evaluator.scores(state, last_exit_alone))
    # What is asked for after the last round comes too late to end anything early.
    reason = None if stop is None or done == config.rounds else stop.reason
    outcome = Outcome(done, frozen["accuracy"], tuned["accuracy"], exported, more, reason, frozen, tuned)
    listeners.call("on_end", state, outcome)
    return state, outcome


def train_round(
    experiment: Experiment, state: GlobalState, round: int, callbacks: Callbacks | None = None
) -> tuple[GlobalState, Round]:
    """Train one round from `state`: sampling, assignment, local training, aggregation, the server's step.

    Returns:
        The state after the round, and its record.

    Raises:
        InputError: all updates are bad, or the new state is not finite.
    """
    method, started = experiment.method, time.perf_counter()
    listeners = Callbacks(experiment) if callbacks is None else callbacks
    work, assignment, devices = experiment.round_work(round)
    state = experiment.with_fresh_stand_ins(state, round, assignment)
    aggregator, tally = method.aggregator(state, round), Tally()
    with experiment.division.share(work, assignment) as share:
        for updates in experiment.executor.train(*share, state):
            method.receive(updates)
            aggregator.add(updates)
            tally.add(updates)
            listeners.update(Update(round, len(work.participants), tally, updates, work, assignment))
    returned, loss, lanes = _merge(experiment, aggregator, tally)
    mode, warn = experiment.config.training.on_bad_update, experiment.processes.is_main
    bad = check_updates(returned, round, mode, experiment.name_clients, warn=warn)
    # Methods decompose or cluster the sums, which must be finite for that.
    check_finite(work, *aggregator.sums())
    after = state
    if returned.samples:
        mean = method.aggregate(aggregator, state, round)
        columns = experiment.foundation.adapter_layout.columns(assignment.factors)
        after = experiment.server.step(state, mean, aggregator.trained(), aggregator.trained_exits(), columns)
    # Equal sums give equal states, to the last bit only on equal hardware.
    experiment.processes.broadcast_(list(after.tensors().values()))
    check_finite(work, *after.tensors().values())
    method.after_round(after, round)
    used = ~np.isin(work.participants, bad)
    metrics = RoundMetrics(
        round=round,
        participants=int(returned.good.sum()),
        samples=returned.samples,
        loss=loss,
        lr=work.lr,
        blocks_held=int(assignment.held[used].any(axis=0).sum()),
        seconds=time.perf_counter() - started,
    )
    metrics.set_allocation(work.participants[used], assignment.held[used], assignment.trained_blocks[used])
    if devices is not None:
        metrics.simulated_seconds, metrics.late, metrics.dropped = devices.seconds, devices.late, devices.dropped
    if len(bad):
        metrics.bad_updates, metrics.bad_clients = len(bad), bad[:MOST_RECORDED].tolist()
    return after, Round(metrics, state, work, assignment, lanes=lanes)


def score(experiment: Experiment, state: GlobalState) -> dict[str, Score]:
    """Score, by domain, the global model or, where the method has them, the clients' own models on their domains."""
    method, evaluator = experiment.method, experiment.evaluator
    personal = method.personal_states(state)
    if personal is not None:
        return evaluator.personal_scores(personal, experiment.domains, state, method.evaluated_model())
    return evaluator.scores(state, method.evaluated_model())


def evaluate(experiment: Experiment, state: GlobalState) -> dict[str, float]:
    """Accuracies, by domain, of what `score` scores."""
    return accuracies(score(experiment, state))


def _merge(
    experiment: Experiment, aggregator: Aggregator, own: Tally
) -> tuple[ReturnedUpdates, float | None, list[int]]:
    """Merge what the processes trained. Returns all updates' facts, the mean loss of a sample, each process's lanes."""
    loss = torch.tensor([float(own.loss)], dtype=torch.float64)
    experiment.processes.all_reduce_([*aggregator.sums(), loss])
    experiment.method.synchronize(experiment.processes)
    parts = experiment.processes.all_gather_object((own.returned(), experiment.executor.lanes))
    returned = ReturnedUpdates.merged([part for part, _ in parts])
    return returned, float(loss) / returned.samples if returned.samples else None, [lanes for _, lanes in parts]
