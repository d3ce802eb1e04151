"""HetLoRA (Cho et al., EMNLP 2024; arXiv 2401.06432): clients of different ranks.

Client k of rank r_k is handed the first r_k rows of A and columns of B (truncation). Updates are padded with zeros to
the largest rank among them, and every module is averaged with the weights ‖B_k A_k‖_F / Σ_j ‖B_j A_j‖_F
(sparsity-weighted aggregation). The ranks beyond keep their values: a block that few clients hold often lacks those of
high rank, and factors that are zero in both A and B have no gradient and stay so for ever.

Rank self-pruning: the local loss has the extra term λ Σ over modules ‖B_k[:, ⌊γ r_k⌋:]‖ ‖A_k[⌊γ r_k⌋:, :]‖. If
the sum is smaller after local training than before, client k drops these ranks: r_k ← ⌊γ r_k⌋, for ever. One scale for
all ranks, since factors scaled differently could not be averaged. γ = 0.99 and λ = 0.01 are those of public
re-implementations; so is one rank per client for all its modules. With `method.weighting samples` a client's norms also
count by its samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedra_engine.federation.assignment import Assignment
from fedra_engine.federation.norm_weighted_aggregation import NormWeightedAggregator
from fedra_engine.federation.rank_penalty import tail_mask, tail_norms
from fedra_engine.federation.work import ClientUpdates
from fedra_engine.methods.allocated import AllocatedMethod
from fedra_engine.methods.base import Federation
from fedra_engine.models.state import GlobalState
from fedra_engine.runtime.errors import InputError
from fedra_engine.runtime.processes import Processes


class HetLoRA(AllocatedMethod):
    """Truncation, zero-padding, norm-weighted means, and clients that prune their own rank."""

    def __init__(self, federation: Federation) -> None:
        super().__init__(federation)
        if federation.deterministic:
            raise InputError(
                "execution.deterministic: found true with method.name hetlora, expected false (its weights are not "
                "whole numbers, so the order of summation changes the last bits)"
            )
        self._options = federation.config.hetlora
        full, count = federation.layout.rank, len(federation.clients)
        given = federation.clients.ranks
        self._ranks = np.full(count, full) if given is None else given.copy()
        if len(np.unique(self._ranks)) == 1:
            self.caution = (
                f"hetlora with one rank, {self._ranks[0]}, for all clients: clients.ranks gives them different ones"
            )

    def assign(self, participants: NDArray[np.int64], round: int) -> Assignment:
        """See `Method.assign`."""
        return replace(
            super().assign(participants, round),
            ranks=self._ranks[participants],
            keep_ratio=self._options.keep_ratio,
            rank_penalty=self._options.penalty,
        )

    def aggregator(self, previous: GlobalState, round: int) -> NormWeightedAggregator:
        """See `Method.aggregator`."""
        self._handed_out = previous.adapters
        federation = self.federation
        return NormWeightedAggregator(previous, federation.layout, self._ranks, weighting=federation.config.weighting)

    def receive(self, updates: ClientUpdates) -> None:
        """See `Method.receive`; cuts the updates of clients that prune."""
        if self._options.keep_ratio == 1:
            return
        for position, client, update in updates.of_good_clients():
            before = self._handed_out[torch.from_numpy(update.blocks).to(update.adapters.device)]
            rank = int(self._ranks[client])
            if self._tail(update.adapters, rank) < self._tail(before, rank):
                self._ranks[client] = max(1, int(rank * self._options.keep_ratio))
                mine = updates.slots[torch.from_numpy(updates.slot_owners == position).to(updates.slots.device)]
                self.federation.layout.truncate(update.adapters, int(self._ranks[client]))
                updates.adapters[mine] = update.adapters

    def synchronize(self, processes: Processes) -> None:
        """See `Method.synchronize`."""
        # A rank only ever falls, and a client is trained by one process, so the smallest is the new one.
        self._ranks = np.minimum.reduce(processes.all_gather_object(self._ranks))

    def tensors(self) -> dict[str, Tensor]:
        """See `Method.tensors`."""
        return {"ranks": torch.from_numpy(self._ranks)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """See `Method.restore`."""
        self._ranks = tensors["ranks"].numpy().copy()

    def _tail(self, slots: Tensor, rank: int) -> float:
        """Σ over slots and targets of ‖B_tail‖ ‖A_tail‖."""
        layout = self.federation.layout
        ranks = torch.full((len(slots),), rank, device=slots.device)
        tail = tail_mask(ranks, self._options.keep_ratio, layout.rank)
        norms = (tail_norms(slots, layout, target, tail) for target in range(len(layout.targets)))
        return float(sum((a * b).sum() for a, b in norms))
