"""What methods that aggregate the adapters' products have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fedra_engine.federation.aggregation import Aggregator
from fedra_engine.federation.product_aggregation import ProductAggregator
from fedra_engine.methods.allocated import AllocatedMethod
from fedra_engine.methods.base import Federation
from fedra_engine.models.adapters import AdapterLayout
from fedra_engine.models.state import GlobalState
from fedra_engine.runtime.errors import InputError


class ProductMethod(AllocatedMethod):
    """Averages B·A beside, or instead of, A and B."""

    def __init__(self, federation: Federation) -> None:
        super().__init__(federation)
        if federation.deterministic:
            raise InputError(
                f"execution.deterministic: found true with method.name {federation.config.name}, expected false (the "
                "order in which products are summed changes the last bits)"
            )

    def aggregator(self, previous: GlobalState, round: int) -> ProductAggregator:
        """See `Method.aggregator`."""
        federation = self.federation
        ranks = federation.clients.ranks
        if ranks is None:
            ranks = np.full(len(federation.clients), federation.layout.rank)
        return ProductAggregator(previous, federation.layout, ranks, weighting=federation.config.weighting)


class BaseWritingMethod(ProductMethod):
    """Also writes into the frozen weights, which become part of the global state."""

    writes_base = True

    def initial_state(self, state: GlobalState, base: Callable[[], tuple[Tensor, ...]]) -> GlobalState:
        """See `Method.initial_state`."""
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
