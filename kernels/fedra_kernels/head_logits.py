"""Per-client classifier without a loss: grouped logits for losses that compare several classifiers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ._kernels.head_products import group_gradients, group_logits
from .dispatch import use_triton
from .groups import RowGroups
from .head import check_heads


def head_logits(
    features: Tensor, weight: Tensor, bias: Tensor, groups: RowGroups, grad_weight: Tensor, grad_bias: Tensor
) -> Tensor:
    """Logits [samples, classes] of each group under its slot's own classifier, differentiable in features.

    They are fp32, and fp64 for fp64 features.

    Args:
        features: [samples, in], grouped by `groups`.
        weight: [slots, classes, in], a view into a bank; bias: [slots, classes].
        groups: the samples of each slot.
        grad_weight, grad_bias: gradient sinks shaped as weight and bias; backward adds into the rows of the
            touched slots. Where features need no gradient, `weight.requires_grad` makes backward run for the sinks.

    Raises:
        ValueError: a shape, dtype, device or group table does not fit.
    """
    check_heads(features, weight, bias, groups, grad_weight, grad_bias)
    logits: Tensor = _HeadLogits.apply(features, weight, bias, groups, grad_weight, grad_bias)
    return logits


def head_logits_reference(features: Tensor, weight: Tensor, bias: Tensor, groups: RowGroups) -> Tensor:
    """The op group by group in plain torch, differentiable in features, weight and bias."""
    parts = zip(groups.host_slots, features.split(groups.sizes), strict=True)
    return torch.cat([F.linear(part, weight[slot], bias[slot]) for slot, part in parts])


class _HeadLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        bias: Tensor,
        groups: RowGroups,
        grad_weight: Tensor,
        grad_bias: Tensor,
    ) -> Tensor:
        ctx.groups, ctx.grad_weight, ctx.grad_bias = groups, grad_weight, grad_bias
        if use_triton(features):
            features = features.contiguous()
        logits = group_logits(features, weight, bias, groups)
        ctx.save_for_backward(features, weight)
        return logits if logits.dtype == torch.float64 else logits.float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logits: Tensor) -> tuple[Tensor | None, ...]:
        features, weight = ctx.saved_tensors
        grad_features = group_gradients(
            features,
            grad_logits.to(features.dtype).contiguous(),
            weight,
            ctx.groups,
            ctx.grad_weight,
            ctx.grad_bias,
            ctx.needs_input_grad[0],
        )
        return grad_features, *([None] * 5)
