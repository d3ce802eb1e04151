"""FedSA-LoRA (Guo et al., ICLR 2025; arXiv 2410.01463): A is shared, B stays with its client.

Clients train both factors. The server averages A over the clients that trained the block; B never leaves its client
and comes back when the client is sampled again. What is evaluated is each client's own model, on its domain's test
set; a client that never took part has the shared A and B as it started, zero, and so has a domain without clients.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedra_engine.federation.aggregation import Aggregator
from fedra_engine.federation.assignment import Assignment
from fedra_engine.federation.private_factors import PrivateFactors
from fedra_engine.federation.work import ClientUpdates
from fedra_engine.methods.allocated import AllocatedMethod
from fedra_engine.methods.base import Federation
from fedra_engine.models.adapters import Factor
from fedra_engine.models.state import GlobalState
from fedra_engine.runtime.processes import Processes


class FedSALora(AllocatedMethod):
    """Averages A; keeps each client's B."""

    def __init__(self, federation: Federation) -> None:
        super().__init__(federation)
        self._columns = federation.layout.columns("B")
        self._private = PrivateFactors(self._columns, federation.depth)

    def assign(self, participants: NDArray[np.int64], round: int) -> Assignment:
        """See `Method.assign`."""
        return replace(super().assign(participants, round), hand_out=self._private.hand_out)

    def receive(self, updates: ClientUpdates) -> None:
        """See `Method.receive`."""
        self._private.keep(updates)

    def synchronize(self, processes: Processes) -> None:
        """See `Method.synchronize`."""
        self._private.synchronize(processes)

    def aggregate(self, aggregator: Aggregator, previous: GlobalState, round: int) -> GlobalState:
        """See `Method.aggregate`."""
        mean = aggregator.result()
        mean.adapters[:, self._columns] = previous.adapters[:, self._columns]
        return mean

    def personal_states(self, state: GlobalState) -> dict[int, Iterable[GlobalState]]:
        """See `Method.personal_states`."""
        domains = self.federation.clients.domains
        members = {domain: np.flatnonzero(domains == domain).tolist() for domain in np.unique(domains).tolist()}
        return {
            domain: (self._private.personal_state(client, state) for client in clients)
            for domain, clients in members.items()
        }

    def uploaded_factors(self, assignment: Assignment) -> Factor:
        """See `Method.uploaded_factors`."""
        return "A"

    def downloaded_factors(self) -> Factor:
        """See `Method.downloaded_factors`."""
        return "A"

    def tensors(self) -> dict[str, Tensor]:
        """See `Method.tensors`."""
        return self._private.tensors()

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """See `Method.restore`."""
        self._private.restore(tensors)
