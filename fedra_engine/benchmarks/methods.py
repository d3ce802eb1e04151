"""What a method costs: one round of each, everything else equal."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from fedra_engine.benchmarks.settings import CPU
from fedra_engine.config import ExperimentConfig
from fedra_engine.execution.work import LocalWork
from fedra_engine.experiment import Experiment, build_experiment
from fedra_engine.federation.sampling import sample_participants

BASELINE = "fedra"


def measure_methods(config: ExperimentConfig, names: Sequence[str], repeats: int) -> list[dict[str, Any]]:
    """CPU-seconds of a round of each method, training and aggregation, and the ratio to FedRA's; medians.

    All clients can hold the whole model, so that every method trains the same blocks. Methods take turns, so that what
    else the machine does disturbs all of them.
    """
    config = replace(config, clients=replace(config.clients, capacities=[config_depth(config)]))
    experiments = {
        name: build_experiment(replace(config, method=replace(config.method, name=name)), CPU)
        for name in dict.fromkeys([BASELINE, *names])
    }
    seconds: dict[str, list[float]] = {name: [] for name in experiments}
    for repeat in range(repeats + 1):
        for name, experiment in experiments.items():
            took = _round_seconds(config, experiment)
            if repeat > 0:
                seconds[name].append(took)
    base = median(seconds[BASELINE])
    return [
        {"method": name, "cpu_seconds": median(times), "over_fedra": median(times) / base}
        for name, times in seconds.items()
    ]


def config_depth(config: ExperimentConfig) -> int:
    """Blocks of the configured model."""
    return build_experiment(config, CPU).foundation.depth


def _round_seconds(config: ExperimentConfig, experiment: Experiment) -> float:
    method, state = experiment.method, experiment.initial_state
    started = time.process_time()
    participants = sample_participants(config.clients, experiment.clients, seed=config.seed, round=0)
    assignment = method.assign(participants, 0)
    work = LocalWork(experiment.clients, participants, config.training, config.seed, 0, config.training.lr)
    aggregator = method.aggregator(state, 0)
    for updates in experiment.executor.train(work, assignment, state):
        method.receive(updates)
        aggregator.add(updates)
    method.aggregate(aggregator, state, 0)
    return time.process_time() - started
