"""FlexLoRA (Bai et al., NeurIPS 2024; arXiv 2402.11505): average the products, then decompose.

The mean product Σ p_i B_i A_i = U S Vᵀ of each weight is decomposed by SVD. The new factors are its best
approximation of the adapters' rank, B = U_r S_r and A = V_rᵀ; a client of smaller rank is handed out the leading
singular directions only. All weights of equal shape are decomposed in one batched call.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import torch
from torch import Tensor

from fedra_engine.federation.aggregation import Aggregator
from fedra_engine.methods.base import register_method
from fedra_engine.methods.products import ProductAggregator, ProductMethod
from fedra_engine.models.adapters import AdapterLayout
from fedra_engine.models.state import GlobalState


@register_method("flexlora")
class FlexLora(ProductMethod):
    """Averages the products exactly up to the cut to the adapters' rank."""

    def aggregate(self, aggregator: Aggregator, previous: GlobalState, round: int) -> GlobalState:
        assert isinstance(aggregator, ProductAggregator)
        held = torch.nonzero(aggregator.held_blocks())[:, 0]
        products = [product[held] for product in aggregator.mean_products()]
        adapters = previous.adapters.clone()
        adapters[held] = decompose(products, self.federation.layout).to(adapters)
        return replace(aggregator.result(), adapters=adapters)


def decompose(products: list[Tensor], layout: AdapterLayout) -> Tensor:
    """Slots [blocks, slot size] whose B·A are the best approximations of `products`, per target [blocks, out, in]."""
    slots = products[0].new_zeros(len(products[0]), layout.size)
    by_shape: defaultdict[torch.Size, list[int]] = defaultdict(list)
    for target, product in enumerate(products):
        by_shape[product.shape].append(target)
    for targets in by_shape.values():
        u, s, vt = torch.linalg.svd(torch.stack([products[target] for target in targets]), full_matrices=False)
        for target, left, values, right in zip(targets, u, s, vt, strict=True):
            rank = min(layout.rank, values.shape[-1])
            layout.lora_b(slots, target)[..., :rank] = left[..., :rank] * values[..., None, :rank]
            layout.lora_a(slots, target)[..., :rank, :] = right[..., :rank, :]
    return slots
