"""The local training of a round: its learning rate, and each participant's steps and batches."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fedra_engine.config import TrainingConfig
from fedra_engine.federation.clients import Clients
from fedra_engine.runtime.errors import count_of
from fedra_engine.runtime.randomness import generator


@dataclass(frozen=True)
class LocalWork:
    """The local training of a round's participants; batches are drawn when a client starts, never stored.

    Attributes:
        participants: int64 [participants], ascending client indices.
        training: hyperparameters, without `even_steps`; see `with_step_limit`.
        seed, round: determine every draw.
    """

    clients: Clients
    participants: NDArray[np.int64]
    training: TrainingConfig
    seed: int
    round: int
    lr: float

    def __post_init__(self) -> None:
        assert not self.training.even_steps, "with_step_limit makes it a limit of steps"

    def __repr__(self) -> str:
        trained = count_of(len(self.participants), "participant")
        return f"LocalWork(round {self.round + 1}: {trained}, learning rate {self.lr:.4g})"

    def steps(self) -> NDArray[np.int64]:
        """Number of local steps of each participant, int64 [participants]."""
        return local_step_counts(self.clients.sample_counts(self.participants), self.training)

    def batches(self, client: int) -> list[NDArray[np.int64]]:
        """Sample rows of each local step of `client`."""
        samples = self.clients.samples[client]
        return local_batches(samples, self.training, seed=self.seed, round=self.round, client=client)


def learning_rate(training: TrainingConfig, round: int, rounds: int) -> float:
    """The learning rate of `round`; `linear` and `cosine` fall from `lr` towards 0 after the last round."""
    progress = round / rounds
    factors = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}
    return training.lr * factors[training.lr_schedule]


def with_step_limit(training: TrainingConfig, clients: Clients) -> TrainingConfig:
    """Replace `even_steps` by the `max_local_steps` that it means for these clients."""
    if not training.even_steps:
        return training
    fewest = clients.sample_counts(np.arange(len(clients))).min(keepdims=True)
    limit = int(local_step_counts(fewest, training)[0]) + 1
    return replace(training, max_local_steps=min(limit, training.max_local_steps or limit), even_steps=False)


def local_step_counts(samples: NDArray[np.int64], training: TrainingConfig) -> NDArray[np.int64]:
    """Number of local steps of clients with `samples` [clients] samples, int64 [clients]."""
    steps = training.local_epochs * -(-samples // training.batch_size)
    return steps if training.max_local_steps is None else np.minimum(steps, training.max_local_steps)


def local_batches(
    samples: NDArray[np.int64], training: TrainingConfig, *, seed: int, round: int, client: int
) -> list[NDArray[np.int64]]:
    """Draw the batch of each local step of a client, as sample rows; every epoch is shuffled afresh.

    The last batch of an epoch may be smaller. `training` has no `even_steps`; see `with_step_limit`.
    """
    rng = generator(seed, round=round, client=client, purpose="batches")
    size, most = training.batch_size, training.max_local_steps
    batches: list[NDArray[np.int64]] = []
    for _ in range(training.local_epochs):
        order = samples.copy()
        rng.shuffle(order)
        end = len(order) if most is None else min(len(order), (most - len(batches)) * size)
        batches.extend(order[start : start + size] for start in range(0, end, size))
        if len(batches) == most:
            break
    return batches
