"""What a run costs by counting, not by measuring: trained and uploaded parameters, and training FLOPs.

The participants, assignments and devices of all rounds are drawn again from the seed; nothing is trained. A participant
whose update does not arrive is not counted. `counting.py` has the formulas. Methods whose assignment depends on earlier
rounds are counted as if they had the initial state in every round.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedra_engine.config import ExperimentConfig
from fedra_engine.costs.memory_model import CostModel
from fedra_engine.experiment import build_experiment


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
    model = CostModel(experiment.foundation, experiment.train_samples, config.lora, config.training)
    trainable, uploaded, participations, flops = 0.0, 0.0, 0, 0.0
    for round in range(config.rounds):
        work, assignment, _ = experiment.round_work(round)
        costs = model.count(experiment.clients, work.participants, assignment, experiment.method)
        participations += len(work.participants)
        trainable += float(costs.trained.sum())
        uploaded += float(costs.uploaded.sum())
        flops += float(costs.flops.sum())
    times = max(participations, 1)
    return RunCosts(trainable / times, uploaded / times, flops)
