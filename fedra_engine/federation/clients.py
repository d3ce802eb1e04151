"""The clients of a federation: their data, domain and capacity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedra_engine.errors import InputError
from fedra_engine.randomness import generator


@dataclass(frozen=True)
class Clients:
    """All clients of a federation; a client is its index.

    Attributes:
        samples: training sample rows of each client.
        domains: int64 [clients], index of each client's domain.
        capacities: int64 [clients], number of blocks each client can hold.
        ranks: int64 [clients], LoRA rank of each; None where all have the adapters' own.
    """

    samples: Sequence[NDArray[np.int64]]
    domains: NDArray[np.int64]
    capacities: NDArray[np.int64]
    ranks: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def sample_counts(self, clients: NDArray[np.int64]) -> NDArray[np.int64]:
        """Training samples of each of `clients`, int64 [clients]."""
        return np.array([len(self.samples[client]) for client in clients], dtype=np.int64)


def capacities_by_domain(capacities: Sequence[int], domains: NDArray[np.int64], depth: int) -> NDArray[np.int64]:
    """Give every client the capacity of its domain; a single entry holds for all. Returns int64 [clients].

    Raises:
        InputError: a capacity outside 1…depth, or neither one entry nor one per domain.
    """
    for capacity in capacities:
        if not 1 <= capacity <= depth:
            raise InputError(
                f"clients.capacities: found {capacity}, expected values from 1 to the model's depth of {depth} blocks"
            )
    return _by_domain("clients.capacities", capacities, domains)


def ranks_by_domain(ranks: Sequence[int], domains: NDArray[np.int64], full: int) -> NDArray[np.int64] | None:
    """Give every client the rank of its domain; a single entry holds for all. None when all have the `full` rank.

    Raises:
        InputError: a rank outside 1…full, or neither none, one entry nor one per domain.
    """
    for rank in ranks:
        if not 1 <= rank <= full:
            raise InputError(f"clients.ranks: found {rank}, expected values from 1 to lora.rank, {full}")
    if all(rank == full for rank in ranks):
        return None
    return _by_domain("clients.ranks", ranks, domains)


def _by_domain(field: str, values: Sequence[int], domains: NDArray[np.int64]) -> NDArray[np.int64]:
    count = int(domains.max()) + 1
    if len(values) not in (1, count):
        raise InputError(f"{field}: found {len(values)} entries, expected 1 or one for each of {count} domains")
    table = np.broadcast_to(np.array(values, dtype=np.int64), (count,))
    return table[domains]


def local_step_counts(
    samples: NDArray[np.int64], *, batch_size: int, epochs: int, max_steps: int | None
) -> NDArray[np.int64]:
    """How many local steps clients with `samples` [clients] samples take, int64 [clients]; see `local_batches`."""
    steps = epochs * -(-samples // batch_size)
    return steps if max_steps is None else np.minimum(steps, max_steps)


def local_batches(
    samples: NDArray[np.int64],
    *,
    batch_size: int,
    epochs: int,
    max_steps: int | None,
    seed: int,
    round: int,
    client: int,
) -> list[NDArray[np.int64]]:
    """The sample rows of each local step of a client in a round; every epoch is a fresh shuffle.

    The last batch of an epoch may be ragged.
    """
    rng = generator(seed, round=round, client=client, purpose="batches")
    batches: list[NDArray[np.int64]] = []
    for _ in range(epochs):
        order = samples.copy()
        rng.shuffle(order)
        batches.extend(order[start : start + batch_size] for start in range(0, len(order), batch_size))
        if max_steps is not None and len(batches) >= max_steps:
            return batches[:max_steps]
    return batches
