"""What a run costs by counting, not by measuring: trained and uploaded parameters, and training FLOPs.

The participants, assignments and devices of all rounds are drawn again from the seed; nothing is trained. A participant
whose update does not arrive is not counted. `counting.py` has the formulas. Methods whose assignment depends on earlier
rounds are counted as if they had the initial state in every round.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedra_engine.config import ExperimentConfig
from fedra_engine.counting import measure_block_flops, parameters_of, processed_samples, sample_flops
from fedra_engine.experiment import build_experiment
from fedra_engine.federation.clients import with_step_limit


@dataclass(frozen=True)
class RunCosts:
    """What a run costs.

    Attributes:
        trainable_parameters: mean over rounds and the participants whose updates arrive.
        uploaded_bytes: likewise; what a participant sends to the server in a round.
        training_flops: of all these participants in all rounds.
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
    block_flops = measure_block_flops(foundation, experiment.train_samples)
    trainable, uploaded, participations, flops = 0.0, 0.0, 0, 0.0
    for round in range(config.rounds):
        work, assignment, _ = experiment.round_work(round)
        participations += len(work.participants)
        trainable += parameters_of(assignment, assignment.factors, foundation).sum()
        uploaded += parameters_of(assignment, method.uploaded_factors(assignment), foundation).sum()
        training = with_step_limit(config.training, experiment.clients)
        samples = processed_samples(experiment.clients.sample_counts(work.participants), training)
        flops += float(samples @ sample_flops(assignment, block_flops, foundation.adapter_layout.rank))
    itemsize, times = foundation.adapter_dtype.itemsize, max(participations, 1)
    return RunCosts(trainable / times, uploaded * itemsize / times, flops)
