"""LoRA-FAIR (Bian et al., ICCV 2025; arXiv 2411.14961): the mean of B, corrected on the server.

With Ā = Σ p_i A_i, B̄ = Σ p_i B_i and ΔW = Σ p_i B_i A_i, the server looks for the correction ΔB that minimises
    1 − cos(ΔW, (B̄ + ΔB) Ā) + λ ‖ΔB‖²   (eq. 8, λ = 0.01),
by gradient descent from ΔB = 0, for every weight by itself, and hands out Ā and B̄ + ΔB. The paper calls the first
term a discrepancy measured by cosine similarity; that the norm is squared, 1000 steps and the rate 0.01 are those of
public re-implementations, the paper leaves them open.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from fedra_engine.federation.aggregation import Aggregator
from fedra_engine.federation.product_aggregation import ProductAggregator
from fedra_engine.methods.products import ProductMethod
from fedra_engine.models.state import GlobalState


class LoRAFair(ProductMethod):
    """Averages A and B and corrects B towards the mean product."""

    def aggregate(self, aggregator: Aggregator, previous: GlobalState, round: int) -> GlobalState:
        """See `Method.aggregate`."""
        assert isinstance(aggregator, ProductAggregator)
        layout, options = self.federation.layout, self.federation.config.lorafair
        mean = aggregator.result()
        held = torch.nonzero(aggregator.held_blocks())[:, 0]
        products = [product[held] for product in aggregator.mean_products()]
        slots = mean.adapters[held].to(products[0])
        by_outputs: defaultdict[int, list[int]] = defaultdict(list)
        for target, shape in enumerate(layout.targets):
            by_outputs[shape.out_features].append(target)
        for targets in by_outputs.values():
            a = [layout.lora_a(slots, target) for target in targets]
            cross = torch.stack([p @ f.transpose(1, 2) for p, f in zip((products[t] for t in targets), a, strict=True)])
            gram = torch.stack([factor @ factor.transpose(1, 2) for factor in a])
            norms = torch.stack([products[target].flatten(1).norm(dim=1) for target in targets])
            b = torch.stack([layout.lora_b(slots, target) for target in targets])
            corrected = correct(b, cross, gram, norms, weight=options.weight, steps=options.steps, lr=options.lr)
            for target, factor in zip(targets, corrected, strict=True):
                layout.lora_b(slots, target).copy_(factor)
        mean.adapters[held] = slots.to(mean.adapters)
        return mean


def correct(b: Tensor, cross: Tensor, gram: Tensor, norms: Tensor, *, weight: float, steps: int, lr: float) -> Tensor:
    """B̄ + ΔB after `steps` of gradient descent on 1 − cos(ΔW, (B̄ + ΔB) Ā) + weight ‖ΔB‖².

    Args:
        b: B̄ [..., out, rank].
        cross: ΔW Āᵀ [..., out, rank].
        gram: Ā Āᵀ [..., rank, rank].
        norms: ‖ΔW‖_F [...].
        weight: λ.
        steps: gradient steps.
        lr: their size.
    """
    corrected = b.clone()
    for _ in range(steps):
        turned = corrected @ gram
        # ‖P Ā‖_F and ⟨ΔW, P Ā⟩ without forming P Ā, for P = B̄ + ΔB.
        length = (corrected * turned).sum((-2, -1)).clamp(min=0).sqrt()
        product = norms * length
        inner = (corrected * cross).sum((-2, -1))
        # Without a product there is no direction to turn to.
        defined = product > 0
        scale = torch.where(defined, 1 / product, torch.zeros_like(product))
        along = torch.where(defined, inner * scale / length.square(), torch.zeros_like(product))
        gradient = along[..., None, None] * turned - scale[..., None, None] * cross
        corrected = corrected - lr * (gradient + 2 * weight * (corrected - b))
    return corrected
