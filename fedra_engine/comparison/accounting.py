"""What a run costs by counting, not by measuring: trained and uploaded parameters, and training FLOPs.

The participants and assignments of all rounds are drawn again from the seed; nothing is trained. `counting.py` has the
formulas. Methods whose assignment depends on what was trained before are counted as if they had the initial state in
every round.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fedra_engine.config import ExperimentConfig
from fedra_engine.counting import measure_block_flops, parameters_of, processed_samples, sample_flops
from fedra_engine.experiment import Experiment, build_experiment
from fedra_engine.federation.assignment import Assignment
from fedra_engine.federation.clients import with_step_limit
from fedra_engine.federation.sampling import sample_participants


@dataclass(frozen=True)
class RunCosts:
    """What a run costs.

    Attributes:
        trainable_parameters: mean over participants and rounds.
        uploaded_bytes: likewise; what a participant sends to the server in a round.
        training_flops: of all participants in all rounds.
    """

    trainable_parameters: float
    uploaded_bytes: float
    training_flops: float


def count_costs(config: ExperimentConfig) -> RunCosts:
    """Count a whole run.

    Raises:
        InputError: something in the configuration cannot be used.
    """
    experiment = build_experiment(config, torch.device("cpu"))
    foundation, method = experiment.foundation, experiment.method
    block_flops = measure_block_flops(foundation, experiment.train)
    trainable, uploaded, participations, flops = 0.0, 0.0, 0, 0.0
    for clients, assignment in _rounds(config, experiment):
        participations += len(clients)
        trainable += parameters_of(assignment, assignment.factors, foundation).sum()
        uploaded += parameters_of(assignment, method.uploaded_factors(assignment), foundation).sum()
        training = with_step_limit(config.training, experiment.clients)
        samples = processed_samples(experiment.clients.sample_counts(clients), training)
        flops += float(samples @ sample_flops(assignment, block_flops, foundation.adapter_layout.rank))
    itemsize, times = foundation.adapter_dtype.itemsize, max(participations, 1)
    return RunCosts(trainable / times, uploaded * itemsize / times, flops)


def _rounds(config: ExperimentConfig, experiment: Experiment) -> Iterator[tuple[NDArray[np.int64], Assignment]]:
    """The participants of each round that hold anything, and their assignment."""
    for round in range(config.rounds):
        participants = sample_participants(config.clients, experiment.clients, seed=config.seed, round=round)
        assignment = experiment.method.assign(participants, round)
        some = np.flatnonzero(assignment.held.any(axis=1))
        yield participants[some], assignment.select(some)
