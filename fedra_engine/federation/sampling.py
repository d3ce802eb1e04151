"""Who takes part in a round."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedra_engine.config import ClientsConfig
from fedra_engine.federation.clients import Clients
from fedra_engine.runtime.errors import InputError
from fedra_engine.runtime.randomness import generator


def check_sampling(config: ClientsConfig, clients: Clients, *, processes: int = 1) -> None:
    """Raises InputError when a round asks for more participants than there are clients, or fewer than processes."""
    if config.participants is not None:
        _check_participants(config, config.participants, clients)
    sampled = most_participants(config, clients)
    if processes > sampled:
        raise InputError(
            f"processes: found {processes}, expected at most the {sampled} participants of a round, which the "
            "processes divide among themselves"
        )


def most_participants(config: ClientsConfig, clients: Clients) -> int:
    """The participants of a round, if all devices are available."""
    if config.sampling == "one_per_domain":
        return len(np.unique(clients.domains))
    return len(clients) if config.participants is None else config.participants


def _check_participants(config: ClientsConfig, participants: int, clients: Clients) -> None:
    if config.sampling == "one_per_domain":
        raise InputError(
            f"clients.participants: found {participants} with clients.sampling one_per_domain, "
            "expected null there (each domain sends one) or clients.sampling uniform"
        )
    if participants > len(clients):
        raise InputError(
            f"clients.participants: found {participants}, expected at most the {len(clients)} clients there are"
        )


def sample_participants(config: ClientsConfig, clients: Clients, *, seed: int, round: int) -> NDArray[np.int64]:
    """The participants of a round in ascending order, int64 [participants]; of clients whose devices are available."""
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
