"""What methods that average the adapters' products B·A have in common.

The mean of products is not the product of means: mean(B_i A_i) ≠ mean(B_i) mean(A_i).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedra_engine.federation.aggregation import Aggregator, Averaging, RankedAggregator
from fedra_engine.federation.work import ClientUpdates
from fedra_engine.methods.allocated import AllocatedMethod
from fedra_engine.models.adapters import AdapterLayout
from fedra_engine.models.state import GlobalState
from fedra_kernels import to_device


class ProductAggregator(RankedAggregator):
    """Also sums the products B·A of every target in every block."""

    def __init__(
        self, previous: GlobalState, averaging: Averaging, layout: AdapterLayout, ranks: NDArray[np.int64]
    ) -> None:
        super().__init__(previous, averaging, layout, ranks)
        depth, like = len(previous.adapters), self._adapters.weight
        self._products = [like.new_zeros(depth, target.out_features, target.in_features) for target in layout.targets]

    def add(self, updates: ClientUpdates) -> None:
        super().add(updates)
        weights = self.slot_weights(updates)
        for block in np.unique(updates.slot_blocks).tolist():
            self._add_block(updates, np.flatnonzero(updates.slot_blocks == block), weights, block)

    def sums(self) -> list[Tensor]:
        return [*super().sums(), *self._products]

    def mean_products(self) -> list[Tensor]:
        """Weighted mean of B·A per target, [blocks, out, in]; zero for a block that nobody held."""
        weight = self._adapters.weight
        divisor = torch.where(weight > 0, weight, torch.ones_like(weight))
        return [product / divisor[:, None, None] for product in self._products]

    def _add_block(self, updates: ClientUpdates, members: NDArray[np.int64], weights: Tensor, block: int) -> None:
        (of_block,) = to_device([members], updates.slots.device)
        slots = updates.adapters[updates.slots[of_block]].to(self._products[0])
        scaled = weights[of_block][:, None, None]
        for target, product in enumerate(self._products):
            # All clients' factors side by side: their sum of products is one product.
            a = self._layout.lora_a(slots, target).flatten(0, 1)
            b = (self._layout.lora_b(slots, target) * scaled).transpose(0, 1).flatten(1)
            product[block].addmm_(b, a)


class ProductMethod(AllocatedMethod):
    """Averages B·A beside, or instead of, A and B."""

    order_matters = "the order in which products are summed changes the last bits"

    def aggregator(self, previous: GlobalState, round: int) -> ProductAggregator:
        federation = self.federation
        return ProductAggregator(previous, federation.averaging, federation.layout, federation.ranks)


class BaseWritingMethod(ProductMethod):
    """Also writes into the frozen weights, which become part of the global state."""

    writes_base = True

    def initial_state(self, state: GlobalState, base: Callable[[], tuple[Tensor, ...]]) -> GlobalState:
        return replace(state, base=base())

    def add_to_base(self, aggregator: Aggregator, residuals: list[Tensor]) -> tuple[Tensor, ...]:
        """The frozen weights plus scale · `residuals` per target, [blocks, out, in], where a block was trained."""
        held, scale = aggregator.held_blocks(), self.federation.scale
        return tuple(
            torch.where(held[:, None, None], (weights + scale * residual).to(weights), weights)
            for weights, residual in zip(aggregator.previous.base, residuals, strict=True)
        )


def factor_products(adapters: Tensor, layout: AdapterLayout) -> list[Tensor]:
    """B·A per target, [blocks, out, in] in float64 on a CPU, of `adapters` [blocks, slot size]."""
    wide = adapters.double() if adapters.device.type == "cpu" else adapters.float()
    return [layout.lora_b(wide, target) @ layout.lora_a(wide, target) for target in range(len(layout.targets))]
