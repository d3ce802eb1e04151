"""The clients of a federation: their data, domains, capacities and devices, and who takes part in a round.

Whatever is drawn for devices is drawn for all clients at once, so that it does not depend on who else takes part or on
the number of processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fedra_engine.config import ClientsConfig, DeviceConfig
from fedra_engine.runtime.errors import InputError, count_of, first_few, span_of
from fedra_engine.runtime.launch import check_busy
from fedra_engine.runtime.randomness import generator

_MOST_NAMED = 12
"""Domains that a message names."""


@dataclass(frozen=True)
class Devices:
    """The device of each client.

    Random values are drawn for all clients at once, so they depend neither on the participants nor on the processes.

    Attributes:
        profiles: kinds of devices.
        of_client: int64 [clients], index into `profiles`.
    """

    profiles: Sequence[DeviceConfig]
    of_client: NDArray[np.int64]
    seed: int

    def __repr__(self) -> str:
        return f"Devices({count_of(len(self.of_client), 'client')}, {count_of(len(self.profiles), 'profile')})"

    def available(self, round: int) -> NDArray[np.bool_]:
        """Draw whether each client is available in `round`, bool [clients]."""
        chances = self.values([profile.availability for profile in self.profiles])
        return self.uniform(round, "availability") < chances

    def values(self, of_profile: Sequence[float]) -> NDArray[np.float64]:
        """The value of each client's device, float64 [clients], from the value `of_profile` of each kind of device."""
        return np.array(of_profile, dtype=np.float64)[self.of_client]

    def uniform(self, round: int, purpose: str) -> NDArray[np.float64]:
        """Draw a uniform number from [0, 1) for each client in `round`, float64 [clients]."""
        return generator(self.seed, round=round, purpose=purpose).random(len(self.of_client))


@dataclass(frozen=True)
class Clients:
    """All clients of a federation; a client is an index.

    Attributes:
        samples: int64 [samples] of each client, its rows of the training set.
        domains: int64 [clients], index of each client's domain.
        capacities: int64 [clients], number of blocks each client can hold.
        ranks: int64 [clients], LoRA ranks; None where all clients have the full one.
        devices: None where devices are not simulated.
        sizes: int64 [clients], number of samples; counted when None.
    """

    samples: Sequence[NDArray[np.int64]]
    domains: NDArray[np.int64]
    capacities: NDArray[np.int64]
    ranks: NDArray[np.int64] | None = None
    devices: Devices | None = None
    sizes: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def __repr__(self) -> str:
        samples, blocks = count_of(int(self._sizes.sum()), "training sample"), self.capacities.tolist()
        return f"Clients({len(self):,}, {samples}, {span_of(blocks, 'block')})"

    @cached_property
    def _sizes(self) -> NDArray[np.int64]:
        return np.array([len(rows) for rows in self.samples], dtype=np.int64) if self.sizes is None else self.sizes

    def ranks_or(self, full: int) -> NDArray[np.int64]:
        """The rank of each client, int64 [clients]; `full` is that of all where `ranks` is None."""
        return np.full(len(self), full, dtype=np.int64) if self.ranks is None else self.ranks

    def sample_counts(self, clients: NDArray[np.int64]) -> NDArray[np.int64]:
        """Number of training samples of each of `clients`, int64 [clients]."""
        return self._sizes[clients]


def capacities_by_domain(
    capacities: Sequence[int], domains: NDArray[np.int64], names: Sequence[str] | None, depth: int
) -> NDArray[np.int64]:
    """Give every client its domain's capacity; a single entry is for all domains. Returns int64 [clients].

    Args:
        capacities: numbers of blocks.
        domains: int64 [clients], the index of each client's domain.
        names: of the domains, for messages; None where clients mix domains and get the entries in turn.
        depth: of the model.

    Raises:
        InputError: a capacity outside 1…depth, or neither one entry nor one per domain.
    """
    _check_range("clients.capacities", capacities, depth, f"the model's depth of {depth} blocks")
    return _by_domain("clients.capacities", capacities, domains, names)


def ranks_by_domain(
    ranks: Sequence[int], domains: NDArray[np.int64], names: Sequence[str] | None, full: int
) -> NDArray[np.int64] | None:
    """As `capacities_by_domain`, for ranks in 1…full; None where all clients have the `full` rank."""
    _check_range("clients.ranks", ranks, full, f"lora.rank, {full}")
    return None if all(rank == full for rank in ranks) else _by_domain("clients.ranks", ranks, domains, names)


def devices_by_domain(
    profiles: Sequence[DeviceConfig], domains: NDArray[np.int64], names: Sequence[str] | None, seed: int
) -> Devices:
    """As `capacities_by_domain`, for devices.

    Raises:
        InputError: neither one entry nor one per domain.
    """
    return Devices(profiles, _by_domain("clients.devices", range(len(profiles)), domains, names), seed)


def draw_devices(profiles: Sequence[DeviceConfig], clients: int, seed: int) -> Devices:
    """Draw each client's device uniformly from the `profiles`."""
    return Devices(profiles, generator(seed, purpose="devices").integers(len(profiles), size=clients), seed)


def _check_range(field: str, values: Sequence[int], most: int, limit: str) -> None:
    for value in values:
        if not 1 <= value <= most:
            raise InputError(f"{field}: found {value}, expected values from 1 to {limit}")


def _by_domain(
    field: str, values: Sequence[int], domains: NDArray[np.int64], names: Sequence[str] | None
) -> NDArray[np.int64]:
    count = int(domains.max()) + 1
    if len(values) not in (1, count):
        if names is None:
            expected = f"at most one for each of the {count} clients, which get them in turn"
        else:
            named = first_few(names[:count], _MOST_NAMED)
            expected = f"1, or one for each of the {count} domains in this order: {named}"
        raise InputError(f"{field}: found {len(values)} entries, expected {expected}")
    return np.broadcast_to(np.array(values, dtype=np.int64), (count,))[domains]


def check_sampling(config: ClientsConfig, clients: Clients, *, processes: int = 1) -> None:
    """Raise InputError when a round has more participants than there are clients, or fewer than processes."""
    sampled = most_participants(config, clients)
    if sampled > len(clients):
        raise InputError(
            f"clients.participants: found {sampled}, expected at most the {len(clients)} clients there are"
        )
    check_busy(processes, sampled)


def most_participants(config: ClientsConfig, clients: Clients) -> int:
    """Number of participants of a round in which all devices are available."""
    if config.sampling == "one_per_domain":
        return len(np.unique(clients.domains))
    return len(clients) if config.participants is None else config.participants


def sample_participants(config: ClientsConfig, clients: Clients, *, seed: int, round: int) -> NDArray[np.int64]:
    """Sample a round's participants from the available clients, ascending int64 [participants]."""
    rng = generator(seed, round=round, purpose="participants")
    everyone = np.arange(len(clients), dtype=np.int64)
    available = everyone if clients.devices is None else np.flatnonzero(clients.devices.available(round))
    if config.sampling == "one_per_domain":
        domains = clients.domains[available]
        members = [available[domains == domain] for domain in np.unique(domains)]
        return np.sort(np.array([rng.choice(domain) for domain in members], dtype=np.int64))
    if config.participants is None or config.participants >= len(available):
        return available
    return np.sort(rng.choice(available, config.participants, replace=False)).astype(np.int64)
