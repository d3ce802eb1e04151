"""The clients of a federation: their data, domain and capacity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fedra_engine.config import DeviceConfig, TrainingConfig
from fedra_engine.federation.devices import Devices
from fedra_engine.runtime.errors import InputError
from fedra_engine.runtime.randomness import generator


@dataclass(frozen=True)
class Clients:
    """All clients of a federation; a client is its index.

    Attributes:
        samples: training sample rows of each client.
        domains: int64 [clients], index of each client's domain.
        capacities: int64 [clients], number of blocks each client can hold.
        ranks: int64 [clients], LoRA rank of each; None where all have the adapters' own.
        devices: the device of each; None where they take no time and are always there.
        sizes: int64 [clients], how many samples each has; counted if not given.
    """

    samples: Sequence[NDArray[np.int64]]
    domains: NDArray[np.int64]
    capacities: NDArray[np.int64]
    ranks: NDArray[np.int64] | None = None
    devices: Devices | None = None
    sizes: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.samples)

    @cached_property
    def _sizes(self) -> NDArray[np.int64]:
        """Training samples of every client, int64 [clients]."""
        return np.array([len(rows) for rows in self.samples], dtype=np.int64) if self.sizes is None else self.sizes

    @cached_property
    def fewest_samples(self) -> int:
        """Training samples of the client with the fewest."""
        return int(self._sizes.min())

    def sample_counts(self, clients: NDArray[np.int64]) -> NDArray[np.int64]:
        """Training samples of each of `clients`, int64 [clients]."""
        return self._sizes[clients]


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


def devices_by_domain(profiles: Sequence[DeviceConfig], domains: NDArray[np.int64], seed: int) -> Devices:
    """Give every client the device of its domain; a single entry holds for all.

    Raises:
        InputError: neither one entry nor one per domain.
    """
    return Devices(profiles, _by_domain("clients.devices", range(len(profiles)), domains), seed)


def _by_domain(field: str, values: Sequence[int], domains: NDArray[np.int64]) -> NDArray[np.int64]:
    count = int(domains.max()) + 1
    if len(values) not in (1, count):
        raise InputError(f"{field}: found {len(values)} entries, expected 1 or one for each of {count} domains")
    table = np.broadcast_to(np.array(values, dtype=np.int64), (count,))
    return table[domains]


def with_step_limit(training: TrainingConfig, clients: Clients) -> TrainingConfig:
    """`training` with what its `even_steps` comes to for `clients` as its `max_local_steps`."""
    if not training.even_steps:
        return training
    (fewest,) = local_step_counts(
        np.array([clients.fewest_samples]), batch_size=training.batch_size, epochs=training.local_epochs, max_steps=None
    )
    limits = [int(fewest) + 1, training.max_local_steps]
    return replace(training, max_local_steps=min(limit for limit in limits if limit is not None), even_steps=False)


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
        end = len(order) if max_steps is None else min(len(order), (max_steps - len(batches)) * batch_size)
        batches.extend(order[start : start + batch_size] for start in range(0, end, batch_size))
        if len(batches) == max_steps:
            break
    return batches
