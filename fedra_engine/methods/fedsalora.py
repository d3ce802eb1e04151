"""FedSA-LoRA (Guo et al., ICLR 2025; arXiv 2410.01463): A is shared, B stays with its client.

Clients train both factors. The server averages A over the clients that trained the block; every client keeps its own B.
Each client's own model is evaluated on its domain's test set; a client that never took part, or a domain without
clients, is evaluated with the shared A and the initial B, zero.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedra_engine.federation.aggregation import Aggregator
from fedra_engine.federation.assignment import Assignment
from fedra_engine.federation.updates import ClientUpdates
from fedra_engine.methods.base import Federation, register_method
from fedra_engine.methods.fedra import FedRA
from fedra_engine.models.adapters import Factor
from fedra_engine.models.state import GlobalState
from fedra_engine.runtime.processes import Processes


@register_method("fedsalora")
class FedSALora(FedRA):
    """Averages A and keeps each client's B, in host memory that grows with the clients that have taken part."""

    hides_movement = "B stays with the clients"

    def __init__(self, federation: Federation) -> None:
        super().__init__(federation)
        self._columns = federation.layout.columns("B")
        self._kept: defaultdict[int, dict[int, Tensor]] = defaultdict(dict)
        """Each client's B by block."""
        self._new: dict[int, dict[int, Tensor]] = {}
        """What `receive` has added to it since the last `synchronize`."""

    def assign(self, participants: NDArray[np.int64], round: int) -> Assignment:
        return replace(super().assign(participants, round), hand_out=self._hand_out)

    def receive(self, updates: ClientUpdates) -> None:
        for _, client, update in updates.of_good_clients():
            # Those that hold only blocks without adapters train their classifiers alone.
            if len(update.blocks) == 0:
                continue
            self._new[client] = _rows(update.blocks, update.adapters[:, self._columns].cpu())
            self._kept[client] |= self._new[client]

    def synchronize(self, processes: Processes) -> None:
        # Another process may train the client next.
        for new in processes.all_gather_object(self._new):
            for client, rows in new.items():
                self._kept[client] |= rows
        self._new = {}

    def aggregate(self, aggregator: Aggregator, previous: GlobalState, round: int) -> GlobalState:
        mean = aggregator.result()
        mean.adapters[:, self._columns] = previous.adapters[:, self._columns]
        return mean

    def personal_states(self, state: GlobalState) -> dict[int, Iterable[GlobalState]]:
        domains = self.federation.clients.domains
        members = {domain: np.flatnonzero(domains == domain).tolist() for domain in np.unique(domains).tolist()}
        return {domain: (self._own_state(client, state) for client in clients) for domain, clients in members.items()}

    def uploaded_factors(self, assignment: Assignment) -> Factor:
        return "A"

    def downloaded_factors(self) -> Factor:
        return "A"

    def tensors(self) -> dict[str, Tensor]:
        blocks = {f"blocks.{client}": torch.tensor(list(kept)) for client, kept in self._kept.items()}
        return blocks | {f"factors.{client}": torch.stack([*kept.values()]) for client, kept in self._kept.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        for name, blocks in tensors.items():
            kind, _, client = name.partition(".")
            if kind == "blocks":
                self._kept[int(client)] |= _rows(blocks.numpy(), tensors[f"factors.{client}"])

    def _hand_out(self, client: int, blocks: NDArray[np.int64], slots: Tensor) -> None:
        """See `assignment.HandOut`."""
        kept = self._kept.get(client, {})
        for row, block in enumerate(blocks.tolist()):
            if block in kept:
                slots[row, self._columns] = kept[block].to(slots)

    def _own_state(self, client: int, state: GlobalState) -> GlobalState:
        """The model of `client`: the global state with its own B."""
        adapters = state.adapters.clone()
        self._hand_out(client, np.arange(self.federation.depth), adapters)
        return replace(state, adapters=adapters)


def _rows(blocks: NDArray[np.int64], values: Tensor) -> dict[int, Tensor]:
    """Each block's row of `values`, copied: a view would keep all of `values` in memory."""
    return {block: row.clone() for block, row in zip(blocks.tolist(), values, strict=True)}
