"""Methods that average the adapters' products B·A: mean(B_i A_i) ≠ mean(B_i) mean(A_i).

FlexLoRA (Bai et al., NeurIPS 2024; arXiv 2402.11505): the mean product Σ p_i B_i A_i = U S Vᵀ of each weight is
decomposed by SVD. The new factors are its best approximation of the adapters' rank, B = U_r S_r and A = V_rᵀ; clients
of smaller rank get the leading singular directions.

FLoRA (Wang et al., NeurIPS 2024; arXiv 2409.05976): the clients' factors are stacked,
[B_1 … B_n] diag(p_1, …, p_n) [A_1; …; A_n] = Σ_i p_i B_i A_i, which is the exact mean product whatever the ranks. It is
added to the frozen weights, times the adapters' scale, and every round starts with fresh adapters: A random, B zero. In
the paper clients download the stack and add it themselves; here the server adds it.

FedEx-LoRA (Singhal et al., ACL 2025; arXiv 2410.09432): A and B are averaged as in FedIT. The residual
Σ p_i B_i A_i − (Σ p_i B_i)(Σ p_i A_i), times the adapters' scale, is added to the frozen weights, so that the new model
is the exact mean of the clients' models.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fedra_engine.federation.aggregation import Aggregator, Averaging, mean_of
from fedra_engine.federation.updates import ClientUpdates
from fedra_engine.methods.base import register_method
from fedra_engine.methods.fedra import FedRA
from fedra_engine.models.adapters import AdapterLayout, initial_adapters
from fedra_engine.models.state import GlobalState
from fedra_kernels import to_device


class ProductAggregator(Aggregator):
    """Also sums the product B·A of every target of every block."""

    def __init__(self, previous: GlobalState, averaging: Averaging) -> None:
        super().__init__(previous, averaging)
        depth, like = len(previous.adapters), self._adapters.weight
        self._products = [like.new_zeros(depth, t.out_features, t.in_features) for t in self.layout.targets]

    def add(self, updates: ClientUpdates) -> None:
        super().add(updates)
        weights = self.slot_weights(updates)
        for block in np.unique(updates.slot_blocks).tolist():
            (members,) = to_device([np.flatnonzero(updates.slot_blocks == block)], weights.device)
            slots = updates.adapters[updates.slots[members]].to(self._products[0])
            scales = weights[members][:, None, None]
            for target, product in enumerate(self._products):
                # With the factors concatenated along the rank, one product is the sum over clients.
                a = self.layout.lora_a(slots, target).flatten(0, 1)
                b = (self.layout.lora_b(slots, target) * scales).transpose(0, 1).flatten(1)
                product[block].addmm_(b, a)

    def sums(self) -> list[Tensor]:
        return [*super().sums(), *self._products]

    def mean_products(self) -> list[Tensor]:
        """Weighted mean of B·A per target, [blocks, out, in]; zero for a block that nobody held."""
        return [mean_of(product, self._adapters.weight[:, None, None]) for product in self._products]

    def held_products(self) -> tuple[Tensor, list[Tensor]]:
        """int64 [held], the blocks that somebody held, and `mean_products` of these, [held, out, in] per target."""
        held = torch.nonzero(self.held_blocks())[:, 0]
        return held, [product[held] for product in self.mean_products()]


class ProductMethod(FedRA):
    """Base of methods that average B·A."""

    aggregates = ProductAggregator
    order_matters = "the order in which products are summed changes the last bits"


@register_method("flexlora")
class FlexLora(ProductMethod):
    """Averages the products and truncates their SVD to the adapters' rank."""

    hides_movement = "its factors have another basis every round"

    def aggregate(self, aggregator: Aggregator, previous: GlobalState, round: int) -> GlobalState:
        assert isinstance(aggregator, ProductAggregator)
        held, products = aggregator.held_products()
        adapters = previous.adapters.clone()
        adapters[held] = decompose(products, self.federation.layout).to(adapters)
        return replace(aggregator.result(), adapters=adapters)


class BaseWritingMethod(ProductMethod):
    """Base of methods that change the frozen weights, which are then part of the global state."""

    writes_base = True
    hides_movement = "it writes what a round learns into the frozen weights"

    def initial_state(self, state: GlobalState, base: Callable[[], tuple[Tensor, ...]]) -> GlobalState:
        return replace(state, base=base())

    def add_to_base(self, aggregator: Aggregator, residuals: list[Tensor]) -> tuple[Tensor, ...]:
        """The frozen weights, plus scale · `residuals` in trained blocks; [blocks, out, in] for each target."""
        held, targets = aggregator.held_blocks(), self.federation.layout.targets
        return tuple(
            torch.where(held[:, None, None], (weights + target.scale * residual).to(weights), weights)
            for target, weights, residual in zip(targets, aggregator.previous.base, residuals, strict=True)
        )


@register_method("flora")
class FLoRA(BaseWritingMethod):
    """Adds the mean product to the frozen weights; adapters start afresh every round."""

    def aggregate(self, aggregator: Aggregator, previous: GlobalState, round: int) -> GlobalState:
        assert isinstance(aggregator, ProductAggregator)
        layout, depth, seed = self.federation.layout, self.federation.depth, self.federation.seed
        fresh = initial_adapters(layout, depth, seed=seed, round=round + 1, dtype=previous.adapters.dtype)
        base = self.add_to_base(aggregator, aggregator.mean_products())
        return replace(aggregator.result(), adapters=fresh.to(previous.adapters.device), base=base)


@register_method("fedexlora")
class FedExLora(BaseWritingMethod):
    """Averages A and B, and adds the difference to the mean product to the frozen weights."""

    def aggregate(self, aggregator: Aggregator, previous: GlobalState, round: int) -> GlobalState:
        assert isinstance(aggregator, ProductAggregator)
        mean = aggregator.result()
        of_means = factor_products(mean.adapters, self.federation.layout)
        residuals = [product - other for product, other in zip(aggregator.mean_products(), of_means, strict=True)]
        return replace(mean, base=self.add_to_base(aggregator, residuals))


def factor_products(adapters: Tensor, layout: AdapterLayout) -> list[Tensor]:
    """B·A of `adapters` [blocks, slot size]: [blocks, out, in] for each target, in float64 on a CPU, else float32."""
    wide = adapters.double() if adapters.device.type == "cpu" else adapters.float()
    return [layout.lora_b(wide, target) @ layout.lora_a(wide, target) for target in range(len(layout.targets))]


def decompose(products: list[Tensor], layout: AdapterLayout) -> Tensor:
    """Decompose the `products`, [blocks, out, in] for each target, into their best factors of the adapters' ranks.

    Returns slots [blocks, slot size]. The largest entry of each row of A is positive: the product leaves the sign open,
    and without a rule the rounding of the product would set it.
    """
    slots = products[0].new_zeros(len(products[0]), layout.size)
    by_shape: defaultdict[torch.Size, list[int]] = defaultdict(list)
    for target, product in enumerate(products):
        by_shape[product.shape].append(target)
    for targets in by_shape.values():
        # One batched call for all weights of equal shape.
        u, s, vt = torch.linalg.svd(torch.stack([products[target] for target in targets]), full_matrices=False)
        for target, left, values, right in zip(targets, u, s, vt, strict=True):
            rank = min(layout.targets[target].rank, values.shape[-1])
            rows = right[..., :rank, :]
            signs = torch.where(rows.gather(-1, rows.abs().argmax(dim=-1, keepdim=True)) < 0, -1.0, 1.0)
            layout.lora_b(slots, target)[..., :rank] = (
                left[..., :rank] * (values[..., :rank] * signs[..., 0])[..., None, :]
            )
            layout.lora_a(slots, target)[..., :rank, :] = rows * signs
    return slots
