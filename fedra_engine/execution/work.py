"""What executors take and give: a round's local work, and what trained clients return."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedra_engine.config import TrainingConfig
from fedra_engine.federation.clients import Clients, local_batches


@dataclass(frozen=True)
class LocalWork:
    """The local training of a round's participants; batches are drawn when a client starts, never stored.

    Attributes:
        clients: the federation.
        participants: int64 [participants], ascending client indices.
        training: optimizer, batch size, epochs.
        seed, round: what the draws are derived from.
        lr: learning rate of this round.
    """

    clients: Clients
    participants: NDArray[np.int64]
    training: TrainingConfig
    seed: int
    round: int
    lr: float

    def sample_counts(self) -> NDArray[np.int64]:
        """Training samples of each participant, int64 [participants]."""
        return self.clients.sample_counts(self.participants)

    def steps(self) -> NDArray[np.int64]:
        """Local steps of each participant, int64 [participants]."""
        steps = self.training.local_epochs * -(-self.sample_counts() // self.training.batch_size)
        return steps if self.training.max_local_steps is None else np.minimum(steps, self.training.max_local_steps)

    def batches(self, client: int) -> list[NDArray[np.int64]]:
        """Sample rows of each local step of `client`."""
        return local_batches(
            self.clients.samples[client],
            batch_size=self.training.batch_size,
            epochs=self.training.local_epochs,
            max_steps=self.training.max_local_steps,
            seed=self.seed,
            round=self.round,
            client=client,
        )


@dataclass(frozen=True)
class ClientUpdates:
    """What a few clients return after their local training, as rows of the executor's banks.

    The banks are reused: the tensors hold these values only until the next updates are asked for.

    Attributes:
        clients: int64 [clients].
        samples: int64 [clients], training samples each client has.
        processed: int64 [clients], samples each client went through in this round, over all local steps.
        losses: float64 [clients], mean training loss over each client's samples.
        adapters: adapter bank [bank rows, slot size].
        slots: int64 [slots], rows of `adapters` that belong to these clients.
        slot_owners: int64 [slots], index into `clients`.
        slot_blocks: int64 [slots], the block each slot is for.
        heads: head bank [bank rows, head size].
        head_rows: int64 [clients], rows of `heads`.
    """

    clients: NDArray[np.int64]
    samples: NDArray[np.int64]
    processed: NDArray[np.int64]
    losses: NDArray[np.float64]
    adapters: Tensor
    slots: Tensor
    slot_owners: NDArray[np.int64]
    slot_blocks: NDArray[np.int64]
    heads: Tensor
    head_rows: Tensor
