"""What a method costs: one round of each, everything else equal."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from benchmarks.settings import CPU
from fedra_engine.config import ExperimentConfig
from fedra_engine.experiment import Experiment, build_experiment

BASELINE = "fedra"


def measure_methods(config: ExperimentConfig, names: Sequence[str], repeats: int) -> list[dict[str, Any]]:
    """CPU-seconds of a round of each method, training and aggregation, and the ratio to FedRA's; medians.

    All clients can hold the whole model, so that every method trains the same blocks. Methods take turns, so that what
    else the machine does disturbs all of them. A method with rounds of two kinds has three rows: the plain round, the
    one in which something is due, and their mean over a run.
    """
    config = replace(config, clients=replace(config.clients, capacities=[config_depth(config)]))
    experiments = {
        name: build_experiment(replace(config, method=replace(config.method, name=name)), CPU)
        for name in dict.fromkeys([BASELINE, *names])
    }
    every = config.method.fedhello.fisher_every
    rounds = [(name, 0) for name in experiments]
    if "fedhello" in experiments:
        rounds.append(("fedhello", every - 1))
    seconds: dict[tuple[str, int], list[float]] = {key: [] for key in rounds}
    for repeat in range(repeats + 1):
        for name, round in rounds:
            took = _round_seconds(experiments[name], round)
            if repeat > 0:
                seconds[name, round].append(took)
    medians = {name: median(seconds[name, 0]) for name in experiments}
    if "fedhello" in experiments:
        due = median(seconds["fedhello", every - 1])
        medians["fedhello, Fisher round"] = due
        medians[f"fedhello, mean of {every} rounds"] = ((every - 1) * medians["fedhello"] + due) / every
    return [
        {"method": name, "cpu_seconds": took, "over_fedra": took / medians[BASELINE]} for name, took in medians.items()
    ]


def config_depth(config: ExperimentConfig) -> int:
    """Blocks of the configured model."""
    return build_experiment(config, CPU).foundation.depth


def _round_seconds(experiment: Experiment, round: int) -> float:
    method, state = experiment.method, experiment.initial_state
    started = time.process_time()
    work, assignment, _ = experiment.round_work(round)
    aggregator = method.aggregator(state, round)
    for updates in experiment.executor.train(work, assignment, state):
        method.receive(updates)
        aggregator.add(updates)
    method.after_round(method.aggregate(aggregator, state, round), round)
    return time.process_time() - started
