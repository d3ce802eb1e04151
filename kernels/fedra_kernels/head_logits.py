"""Per-client classifier without a loss: grouped logits for losses that compare several classifiers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from . import head_torch
from .dispatch import use_triton
from .groups import RowGroups
from .head import check_heads
from .head_products import head_grads, head_product, product_tile


def head_logits(
    features: Tensor, weight: Tensor, bias: Tensor, groups: RowGroups, grad_weight: Tensor, grad_bias: Tensor
) -> Tensor:
    """Logits [samples, classes] of each group under its slot's own classifier, differentiable in features.

    They are fp32, and fp64 for fp64 features.

    Args:
        features: [samples, in], grouped by `groups`.
        weight: [slots, classes, in], a view into a bank; bias: [slots, classes].
        groups: the samples of each slot; its scales are not used.
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
            rows = groups.chunks(product_tile(features).rows).rows
            logits = head_product(features, weight, bias, rows, False)
        else:
            logits = head_torch.logits(features, weight, bias, groups)
            logits = logits if logits.dtype == torch.float64 else logits.float()
        ctx.save_for_backward(features, weight)
        return logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logits: Tensor) -> tuple[Tensor | None, ...]:
        features, weight = ctx.saved_tensors
        groups: RowGroups = ctx.groups
        grad_logits = grad_logits.to(features.dtype).contiguous()
        grad_features = None
        if use_triton(features):
            head_grads(features, grad_logits, groups.filled, ctx.grad_weight, ctx.grad_bias)
            if ctx.needs_input_grad[0]:
                rows = groups.chunks(product_tile(features).rows).rows
                grad_features = head_product(grad_logits, weight, None, rows, True)
        else:
            head_torch.add_grads(features, grad_logits, groups, ctx.grad_weight, ctx.grad_bias)
            if ctx.needs_input_grad[0]:
                grad_features = head_torch.grad_features(grad_logits, weight, groups)
        return grad_features, *([None] * 5)
