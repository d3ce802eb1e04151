"""Who takes part in a round."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedra_engine.config import ClientsConfig
from fedra_engine.errors import InputError
from fedra_engine.federation.clients import Clients
from fedra_engine.randomness import generator


def check_sampling(config: ClientsConfig, clients: Clients) -> None:
    """Raises InputError when more participants are asked for than there are clients."""
    if config.participants is None:
        return
    if config.sampling == "one_per_domain":
        raise InputError(
            f"clients.participants: found {config.participants} with clients.sampling one_per_domain, "
            "expected null there (each domain sends one) or clients.sampling uniform"
        )
    if config.participants > len(clients):
        raise InputError(
            f"clients.participants: found {config.participants}, expected at most the {len(clients)} clients there are"
        )


def sample_participants(config: ClientsConfig, clients: Clients, *, seed: int, round: int) -> NDArray[np.int64]:
    """The participants of a round in ascending order, int64 [participants]."""
    rng = generator(seed, round=round, purpose="participants")
    if config.sampling == "one_per_domain":
        members = [np.flatnonzero(clients.domains == domain) for domain in np.unique(clients.domains)]
        return np.sort(np.array([rng.choice(domain) for domain in members], dtype=np.int64))
    if config.participants is None or config.participants == len(clients):
        return np.arange(len(clients), dtype=np.int64)
    return np.sort(rng.choice(len(clients), config.participants, replace=False)).astype(np.int64)
