"""The penalty that draws a client's last ranks towards zero, for methods that prune them (HetLoRA)."""

from __future__ import annotations

import torch
from torch import Tensor

from fedra_engine.models.adapters import AdapterLayout


def tail_mask(ranks: Tensor, keep_ratio: float, rank: int) -> Tensor:
    """bool [slots, rank]: of slots of clients of ranks r [slots], those from max(1, ⌊keep_ratio · r⌋) up to r."""
    position = torch.arange(rank, device=ranks.device)
    return (position >= (ranks.double() * keep_ratio).floor().clamp(min=1)[:, None]) & (position < ranks[:, None])


def tail_norms(slots: Tensor, layout: AdapterLayout, target: int, tail: Tensor) -> tuple[Tensor, Tensor]:
    """Frobenius norms [slots] of the `tail` [slots, rank] rows of A and columns of B of one target."""
    a = layout.lora_a(slots, target) * tail[:, :, None]
    b = layout.lora_b(slots, target) * tail[:, None, :]
    return a.flatten(1).norm(dim=1), b.flatten(1).norm(dim=1)


def add_penalty_gradients(
    parameters: Tensor, gradients: Tensor, rows: Tensor, tail: Tensor, layout: AdapterLayout, weight: float
) -> None:
    """Add the gradient of weight · Σ over targets ‖B_tail‖ ‖A_tail‖ to the bank rows `rows`, in place.

    Args:
        parameters, gradients: banks [bank rows, slot size].
        rows: int64 [slots].
        tail: bool [slots, rank], see `tail_mask`.
        layout: where the factors lie.
        weight: λ.
    """
    slots, change = parameters[rows], torch.zeros_like(gradients[rows])
    for target in range(len(layout.targets)):
        norm_a, norm_b = tail_norms(slots, layout, target, tail)
        # A norm is not differentiable at zero; zero is the subgradient that autograd takes, too.
        per_a = torch.where(norm_a > 0, norm_b / norm_a, torch.zeros_like(norm_a))[:, None, None]
        per_b = torch.where(norm_b > 0, norm_a / norm_b, torch.zeros_like(norm_b))[:, None, None]
        layout.lora_a(change, target).copy_(weight * per_a * layout.lora_a(slots, target) * tail[:, :, None])
        layout.lora_b(change, target).copy_(weight * per_b * layout.lora_b(slots, target) * tail[:, None, :])
    gradients.index_add_(0, rows, change)
