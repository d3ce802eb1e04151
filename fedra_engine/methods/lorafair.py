"""LoRA-FAIR (Bian et al., ICCV 2025; arXiv 2411.14961): a server-side correction of the mean of B.

With Ā = Σ p_i A_i, B̄ = Σ p_i B_i and ΔW = Σ p_i B_i A_i of a weight, the server minimises
    1 − cos(ΔW, (B̄ + ΔB) Ā) + λ ‖ΔB‖²   (eq. 8, λ = 0.01)
by gradient descent from ΔB = 0, and hands out Ā and B̄ + ΔB. The paper does not say that the norm is squared; public
re-implementations square it. The gradient of the cosine grows as B̄ shrinks, and a fixed learning rate diverges while B
is small. So rates are in units of 1 / (tr(Ā Āᵀ) / ‖B̄ Ā‖² + 2 λ), the inverse of the curvature, which are stable; with
the default rate and number of steps the objective converges.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from fedra_engine.federation.aggregation import Aggregator
from fedra_engine.methods.base import register_method
from fedra_engine.methods.products import ProductAggregator, ProductMethod
from fedra_engine.models.state import GlobalState


@register_method("lorafair")
class LoRAFair(ProductMethod):
    """Averages A and B, and corrects B towards the mean product."""

    def aggregate(self, aggregator: Aggregator, previous: GlobalState, round: int) -> GlobalState:
        assert isinstance(aggregator, ProductAggregator)
        layout, options, mean = self.federation.layout, self.options, aggregator.result()
        held, products = aggregator.held_products()
        # Ranks that nobody trained keep their values; they are no part of what the others are corrected towards.
        trained = aggregator.trained()[held]
        slots = mean.adapters[held].to(products[0]) * trained
        by_rank: defaultdict[int, list[int]] = defaultdict(list)
        for target, of_layout in enumerate(layout.targets):
            by_rank[of_layout.rank].append(target)
        for targets in by_rank.values():
            # The reduced problems of targets of one rank have one shape, so one descent solves them all.
            problems = [
                coordinates(products[target], layout.lora_b(slots, target), layout.lora_a(slots, target))
                for target in targets
            ]
            bases, *parts = zip(*problems, strict=True)
            solved = descend(*map(torch.stack, parts), weight=options.weight, steps=options.steps, lr=options.lr)
            for target, basis, z in zip(targets, bases, solved, strict=True):
                layout.lora_b(slots, target).copy_(basis @ z)
        mean.adapters[held] = torch.where(trained, slots.to(mean.adapters), mean.adapters[held])
        return mean


def coordinates(product: Tensor, b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Reduce the objective of one target to small matrices.

    The gradient with respect to P = B̄ + ΔB is a combination of P Ā Āᵀ, C = ΔW Āᵀ and P − B̄. So P stays in the span of
    the columns of B̄ and C: P = [B̄ C] Z with Z [2 · rank, rank], whatever the size of the weight.

    Args:
        product, b, a: ΔW [blocks, out, in], B̄ [blocks, out, rank] and Ā [blocks, rank, in].

    Returns:
        [B̄ C] [blocks, out, 2 · rank], [B̄ C]ᵀ [B̄ C], Ā Āᵀ, and ‖ΔW‖_F [blocks].
    """
    basis = torch.cat([b, product @ a.transpose(1, 2)], dim=2)
    return basis, basis.transpose(1, 2) @ basis, a @ a.transpose(1, 2), product.flatten(1).norm(dim=1)


def descend(gram_basis: Tensor, gram_a: Tensor, norm: Tensor, *, weight: float, steps: int, lr: float) -> Tensor:
    """Minimise the objective by gradient descent from ΔB = 0. Returns Z [..., 2 · rank, rank].

    Args:
        gram_basis, gram_a, norm: the last three results of `coordinates`.
        weight: λ.
        steps: number of steps.
        lr: learning rate, in units of 1 / (tr(Ā Āᵀ) / ‖B̄ Ā‖² + 2 λ).
    """
    rank = gram_a.shape[-1]
    identity = torch.eye(2 * rank, dtype=norm.dtype, device=norm.device)
    mean_b, cross = identity[:, :rank], identity[:, rank:]
    z = mean_b.expand(*gram_a.shape[:-2], 2 * rank, rank)
    start = ((gram_basis @ z) * (z @ gram_a)).sum((-2, -1)).clamp(min=0)
    trace = gram_a.diagonal(dim1=-2, dim2=-1).sum(-1)
    rate = torch.where(trace > 0, lr * start / (trace + 2 * weight * start), 0)[..., None, None]
    for _ in range(steps):
        turned = z @ gram_a
        # ‖P Ā‖² and ⟨ΔW, P Ā⟩.
        square = ((gram_basis @ z) * turned).sum((-2, -1)).clamp(min=0)
        inner = (gram_basis[..., rank:] * z).sum((-2, -1))
        # The cosine of a zero product is not defined.
        defined = (square > 0) & (norm > 0)
        scale = torch.where(defined, 1 / (norm * square.sqrt()), 0)
        along = torch.where(defined, inner * scale / square, 0)
        z = z - rate * (along[..., None, None] * turned - scale[..., None, None] * cross + 2 * weight * (z - mean_b))
    return z
