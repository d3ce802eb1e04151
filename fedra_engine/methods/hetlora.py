"""HetLoRA (Cho et al., EMNLP 2024; arXiv 2401.06432): clients of different ranks.

Client k of rank r_k downloads the first r_k rows of A and columns of B (truncation). Updates are padded with zeros to
the largest rank among them, and every module is averaged with the weights ‖B_k A_k‖_F / Σ_j ‖B_j A_j‖_F
(sparsity-weighted aggregation), times the clients' samples with `method.weighting samples`. Ranks beyond the largest
keep their values: set to zero in both A and B, they would have no gradient and could never be trained again.

Rank self-pruning: the local loss has the extra term λ Σ over modules ‖B_k[:, ⌊γ r_k⌋:]‖ ‖A_k[⌊γ r_k⌋:, :]‖. If local
training makes the sum smaller, client k drops these ranks for good: r_k ← ⌊γ r_k⌋. All ranks have one scale, since
factors of different scales could not be averaged. γ = 0.99, λ = 0.01 and one rank per client for all its modules are
those of public re-implementations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedra_engine.config import HetLoraConfig
from fedra_engine.federation.aggregation import Aggregator, Averaging, mean_of
from fedra_engine.federation.assignment import Assignment
from fedra_engine.federation.local_terms import ClientAlone, ClientsInTraining, LocalTerm
from fedra_engine.federation.updates import ClientUpdates
from fedra_engine.methods.base import Federation, register_method
from fedra_engine.methods.fedra import FedRA
from fedra_engine.models.adapters import AdapterLayout
from fedra_engine.models.state import GlobalState
from fedra_engine.runtime.processes import Processes
from fedra_kernels import to_device


class NormWeightedAggregator(Aggregator):
    """Averages A and B of each target with the weights w_i ‖B_i A_i‖ / Σ w_j ‖B_j A_j‖; heads as in `Aggregator`.

    w_i is client i's weight in `Aggregator`. Ranks that a client lacks count as zeros; ranks that all clients of a
    block lack keep their values, and so does a target whose products are all zero.
    """

    def __init__(self, previous: GlobalState, averaging: Averaging) -> None:
        super().__init__(previous, averaging)
        like = self._adapters.weight
        self._sums = like.new_zeros(previous.adapters.shape)
        self._norms = like.new_zeros(len(previous.adapters), len(self.layout.targets))

    def add(self, updates: ClientUpdates) -> None:
        super().add(updates)
        slots = updates.adapters[updates.slots].to(self._sums)
        (blocks,) = to_device([updates.slot_blocks], slots.device)
        norms = product_norms(slots, self.layout) * self.slot_weights(updates)[:, None]
        self._norms.index_add_(0, blocks, norms)
        self._sums.index_add_(0, blocks, slots * self.layout.per_target(norms))

    def sums(self) -> list[Tensor]:
        return [*super().sums(), self._sums, self._norms]

    def result(self) -> GlobalState:
        norms = self.layout.per_target(self._norms)
        mean = mean_of(self._sums, norms)
        previous = self.previous.adapters
        adapters = torch.where((norms > 0) & self.trained(), mean.to(previous), previous)
        return replace(super().result(), adapters=adapters)


@register_method("hetlora")
class HetLoRA(FedRA):
    """Norm-weighted means of clients of different ranks, which prune their own rank."""

    aggregates = NormWeightedAggregator
    ranks: NDArray[np.int64]
    order_matters = "its weights are not whole numbers, so the order of summation changes the last bits"

    def __init__(self, federation: Federation) -> None:
        super().__init__(federation)
        options: HetLoraConfig = self.options
        given = federation.clients.ranks
        self.ranks = np.full(len(federation.clients), federation.layout.rank) if given is None else given.copy()
        self._keep_ratio = options.keep_ratio
        self._terms = (RankPenalty(options.keep_ratio, options.penalty),) if options.penalty > 0 else ()
        if len(np.unique(self.ranks)) == 1:
            self.caution = (
                f"hetlora with one rank, {self.ranks[0]}, for all clients: clients.ranks gives them different ones"
            )

    def assign(self, participants: NDArray[np.int64], round: int) -> Assignment:
        return replace(super().assign(participants, round), terms=self._terms)

    def aggregator(self, previous: GlobalState, round: int) -> Aggregator:
        self._handed_out = previous.adapters
        return super().aggregator(previous, round)

    def receive(self, updates: ClientUpdates) -> None:
        if self._keep_ratio == 1:
            return
        for position, client, update in updates.of_good_clients():
            before = self._handed_out[torch.from_numpy(update.blocks).to(update.adapters.device)]
            rank = int(self.ranks[client])
            if self._tail(update.adapters, rank) < self._tail(before, rank):
                self.ranks[client] = max(1, int(rank * self._keep_ratio))
                mine = updates.slots[torch.from_numpy(updates.slot_owners == position).to(updates.slots.device)]
                self.federation.layout.truncate(update.adapters, int(self.ranks[client]))
                updates.adapters[mine] = update.adapters

    def synchronize(self, processes: Processes) -> None:
        # Ranks only fall, and one process trains a client, so the smallest rank is the new one.
        self.ranks = np.minimum.reduce(processes.all_gather_object(self.ranks))

    def tensors(self) -> dict[str, Tensor]:
        return {**super().tensors(), "ranks": torch.from_numpy(self.ranks)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        super().restore(tensors)
        self.ranks = tensors["ranks"].numpy().copy()

    def _tail(self, slots: Tensor, rank: int) -> float:
        """Σ over slots and targets of ‖B_tail‖ ‖A_tail‖."""
        layout = self.federation.layout
        ranks = torch.full((len(slots),), rank, device=slots.device)
        tail = tail_mask(ranks, self._keep_ratio, layout.rank)
        norms = (tail_norms(slots, layout, target, tail) for target in range(len(layout.targets)))
        return float(sum((a * b).sum() for a, b in norms))


@dataclass(frozen=True)
class RankPenalty(LocalTerm):
    """λ Σ ‖B_tail‖ ‖A_tail‖ over a client's adapters; the tail is the ranks from ⌊γ r⌋ on, γ = `keep_ratio`."""

    keep_ratio: float
    weight: float

    def add_gradients(self, clients: ClientsInTraining) -> None:
        layout, slots = clients.layout, clients.adapters.values
        tail, change = tail_mask(clients.ranks, self.keep_ratio, layout.rank), torch.zeros_like(slots)
        for target in range(len(layout.targets)):
            norm_a, norm_b = tail_norms(slots, layout, target, tail)
            # At zero, where a norm is not differentiable, autograd too takes the subgradient zero.
            per_a = torch.where(norm_a > 0, norm_b / norm_a, torch.zeros_like(norm_a))[:, None, None]
            per_b = torch.where(norm_b > 0, norm_a / norm_b, torch.zeros_like(norm_b))[:, None, None]
            layout.lora_a(change, target).copy_(self.weight * per_a * layout.lora_a(slots, target) * tail[:, :, None])
            layout.lora_b(change, target).copy_(self.weight * per_b * layout.lora_b(slots, target) * tail[:, None, :])
        clients.adapters.add(change)

    def loss(self, client: ClientAlone) -> Tensor:
        first = [max(1, int(len(a) * self.keep_ratio)) for a, _ in client.factors]
        norms = [b[:, k:].norm() * a[k:].norm() for k, (a, b) in zip(first, client.factors, strict=True)]
        return self.weight * torch.stack(norms).sum()


def tail_mask(ranks: Tensor, keep_ratio: float, rank: int) -> Tensor:
    """bool [slots, rank], the positions from max(1, ⌊keep_ratio · r⌋) up to r, for r in `ranks` [slots]."""
    position = torch.arange(rank, device=ranks.device)
    return (position >= (ranks.double() * keep_ratio).floor().clamp(min=1)[:, None]) & (position < ranks[:, None])


def tail_norms(slots: Tensor, layout: AdapterLayout, target: int, tail: Tensor) -> tuple[Tensor, Tensor]:
    """Frobenius norms [slots] of the `tail` [slots, rank] rows of a target's A, and columns of its B."""
    a = layout.lora_a(slots, target) * tail[:, :, None]
    b = layout.lora_b(slots, target) * tail[:, None, :]
    return a.flatten(1).norm(dim=1), b.flatten(1).norm(dim=1)


def product_norms(slots: Tensor, layout: AdapterLayout) -> Tensor:
    """‖B·A‖_F of each target, [slots, targets], without forming the products."""
    norms = []
    for target in range(len(layout.targets)):
        a, b = layout.lora_a(slots, target), layout.lora_b(slots, target)
        # ‖B A‖² = tr(Bᵀ B A Aᵀ), both [rank, rank].
        squares = ((b.transpose(1, 2) @ b) * (a @ a.transpose(1, 2))).sum((1, 2))
        norms.append(squares.clamp(min=0).sqrt())
    return torch.stack(norms, dim=1)
