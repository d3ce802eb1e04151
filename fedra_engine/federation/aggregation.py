"""Streaming aggregation: a mean over the clients that hold each block, or over those that have each rank of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedra_engine.federation.updates import ClientUpdates
from fedra_engine.models.adapters import AdapterLayout
from fedra_engine.models.state import GlobalState
from fedra_kernels import aggregate, finish_aggregate, to_device

_COARSE_BITS = 24
_FINE_BITS = 60


@dataclass(frozen=True)
class Averaging:
    """How an aggregator averages.

    Attributes:
        weighting: weight clients equally, or by their number of samples.
        deterministic: make sums independent of the order of updates.
        layout: adapter layout; only means by rank or target need it.
        ranks: int64 [clients], LoRA ranks; None where every client has the layout's rank.
    """

    weighting: Literal["uniform", "samples"] = "uniform"
    deterministic: bool = False
    layout: AdapterLayout | None = None
    ranks: NDArray[np.int64] | None = None


class Aggregator:
    """Weighted mean of each block's updates over its holders (FedRA, §3); updates may arrive in any order.

    With clients of several ranks, each rank is averaged over the clients that have it, and keeps its value where none
    does: the zeros that clients of lower rank return would shrink it.

    Memory is that of the global state, whatever the number of clients. Sums are kept in float64 on a CPU and in
    float32, in a fixed order, on a GPU.

    With `deterministic`, values are rounded to multiples of 2⁻⁶⁰ and summed as a coarse (multiples of 2⁻²⁴) and a
    fine part in float64. Every such sum is exact while the weights are whole numbers and their total, times the
    largest value, stays below 2²⁸; exact sums do not depend on their order.
    """

    def __init__(self, previous: GlobalState, averaging: Averaging = Averaging()) -> None:
        """Begin a round whose participants start from `previous`."""
        self.previous = previous
        self.averaging = averaging
        self._adapters = WeightedSum(previous.adapters, averaging.deterministic)
        self._heads = WeightedSum(previous.heads, averaging.deterministic)
        self._by_rank: Tensor | None = None
        """[blocks, rank], total weight of the clients that have each rank of each block."""
        if averaging.ranks is not None:
            self._by_rank = self._adapters.weight.new_zeros(len(previous.adapters), self.layout.rank)

    @property
    def layout(self) -> AdapterLayout:
        """The adapter layout, which `averaging` must give."""
        assert self.averaging.layout is not None
        return self.averaging.layout

    def add(self, updates: ClientUpdates) -> None:
        """Add the updates of a few clients."""
        weights = self.slot_weights(updates)
        self._adapters.add(updates.adapters, updates.slots, updates.slot_blocks, weights)
        head_weights = self._weights(updates, updates.head_owners)
        self._heads.add(updates.heads, updates.head_rows, updates.head_exits, head_weights)
        if self._by_rank is not None and self.averaging.ranks is not None:
            has = np.arange(self.layout.rank) < self.averaging.ranks[updates.clients][updates.slot_owners, None]
            blocks, has_rank = to_device([updates.slot_blocks, has], weights.device)
            self._by_rank.index_add_(0, blocks, weights[:, None] * has_rank)

    def sums(self) -> list[Tensor]:
        """All sums over clients that the aggregator keeps; adding those of several aggregators merges them."""
        by_rank = [] if self._by_rank is None else [self._by_rank]
        return [*self._adapters.sums(), *self._heads.sums(), *by_rank]

    def result(self) -> GlobalState:
        """The new global state; blocks, ranks and classifiers that nobody trained keep their values."""
        previous = self.previous
        adapters = self._adapters.mean(previous.adapters)
        if self._by_rank is not None:
            shares = self.layout.per_rank(mean_of(self._by_rank, self._adapters.weight[:, None]).to(adapters))
            adapters = torch.where(shares > 0, mean_of(adapters, shares), previous.adapters)
        return replace(previous, adapters=adapters, heads=self._heads.mean(previous.heads))

    def held_blocks(self) -> Tensor:
        """bool [blocks], the blocks that some client has trained."""
        return self._adapters.weight > 0

    def trained(self) -> Tensor:
        """bool [blocks, slot size] or [blocks, 1], the adapter entries that some client has trained."""
        return self.held_blocks()[:, None] if self._by_rank is None else self.layout.per_rank(self._by_rank) > 0

    def trained_exits(self) -> Tensor:
        """bool [exits], the classifiers that some client has trained."""
        return self._heads.weight > 0

    def slot_weights(self, updates: ClientUpdates) -> Tensor:
        """Weight of each slot's client, [slots] in the precision of the sums; 0 where its update is bad."""
        return self._weights(updates, updates.slot_owners)

    def _weights(self, updates: ClientUpdates, owners: NDArray[np.int64]) -> Tensor:
        by_samples = self.averaging.weighting == "samples"
        weights = updates.samples[owners] if by_samples else np.ones_like(owners)
        like = self._adapters.weight
        wanted, positions = to_device([weights, owners], like.device)
        return wanted.to(like.dtype).where(updates.good.index_select(0, positions), 0)


class WeightedSum:
    """Σ w·v [rows, size] and Σ w [rows] over the values v that are added to each row."""

    def __init__(self, like: Tensor, deterministic: bool = False) -> None:
        # A GPU's float64 units are slow and the kernel's order of summation is fixed, so float32 serves there.
        exact = deterministic or like.device.type == "cpu"
        dtype = torch.float64 if exact else torch.float32
        self._parts = [torch.zeros(like.shape, dtype=dtype, device=like.device) for _ in range(1 + deterministic)]
        self.weight = torch.zeros(len(like), dtype=dtype, device=like.device)

    def add(self, bank: Tensor, rows: Tensor, targets: NDArray[np.int64], weight: Tensor) -> None:
        """Add `bank[rows]`, weighted by `weight` [rows] in the precision of the sums, to the rows `targets`."""
        (where,) = to_device([targets], bank.device)
        if len(self._parts) == 1:
            aggregate(self._parts[0], self.weight, bank, rows, where, weight)
            return
        values = bank[rows].double()
        every = torch.arange(len(values), device=bank.device)
        coarse = _round_to(values, _COARSE_BITS)
        aggregate(self._parts[0], self.weight, coarse, every, where, weight)
        fine = _round_to(values - coarse, _FINE_BITS)
        aggregate(self._parts[1], torch.zeros_like(self.weight), fine, every, where, weight)

    def sums(self) -> list[Tensor]:
        """Σ w·v, in one or two parts, and Σ w."""
        return [*self._parts, self.weight]

    def mean(self, previous: Tensor) -> Tensor:
        """Weighted mean of each row; rows without weight keep `previous`."""
        total = self._parts[0] if len(self._parts) == 1 else self._parts[0] + self._parts[1]
        return finish_aggregate(total, self.weight, previous)


def mean_of(total: Tensor, weight: Tensor) -> Tensor:
    """`total` / `weight`, and `total` itself where there is no weight."""
    return total / torch.where(weight > 0, weight, 1)


def _round_to(values: Tensor, bits: int) -> Tensor:
    return torch.ldexp(torch.ldexp(values, torch.tensor(bits)).round_(), torch.tensor(-bits))
