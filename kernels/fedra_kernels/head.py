"""Per-client classifier with cross entropy: grouped logits, one mean loss per client."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ._kernels.checks import check_bank, check_device, check_float, check_index, check_like, check_shape, check_sink
from ._kernels.head_loss import head_loss, head_loss_backward, torch_loss, torch_loss_backward
from ._kernels.head_products import group_gradients, group_logits, product_tile
from .dispatch import use_triton
from .groups import RowGroups


def head_cross_entropy(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    groups: RowGroups,
    grad_weight: Tensor,
    grad_bias: Tensor,
) -> tuple[Tensor, Tensor]:
    """Mean cross entropy and number of right answers of each group under its slot's own classifier.

    Args:
        features: [samples, in], grouped by `groups`.
        weight: [slots, classes, in], a view into a bank; bias: [slots, classes].
        labels: int64 [samples]. On a GPU their values are not checked: a label out of range makes its
            group's loss NaN.
        groups: the samples of each slot.
        grad_weight, grad_bias: gradient sinks shaped as weight and bias; backward adds into the rows of the
            touched slots, each times the gradient of its group's loss.

    Returns:
        losses [groups], fp32 (fp64 for fp64 features), differentiable in features; correct, int64 [groups].
        A group without samples has loss 0. Where features need no gradient, `weight.requires_grad` makes
        backward run for the sinks.

    Raises:
        ValueError: a shape, dtype, device, label or group table does not fit.
    """
    check_heads(features, weight, bias, groups, grad_weight, grad_bias)
    check_shape("labels", labels, (groups.rows,))
    check_index("labels", labels, "weight", weight, dim=1)
    losses, correct = _HeadCrossEntropy.apply(features, weight, bias, labels, groups, grad_weight, grad_bias)
    return losses, correct


def head_cross_entropy_reference(
    features: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, groups: RowGroups
) -> tuple[Tensor, Tensor]:
    """The op group by group in plain torch, differentiable in features, weight and bias."""
    losses, correct = [], []
    parts = zip(groups.host_slots, features.split(groups.sizes), labels.split(groups.sizes), strict=True)
    for slot, part, part_labels in parts:
        logits = F.linear(part, weight[slot], bias[slot])
        loss = F.cross_entropy(logits, part_labels) if len(part) else logits.sum()
        losses.append(loss)
        correct.append((logits.argmax(1) == part_labels).sum())
    return torch.stack(losses), torch.stack(correct)


class _HeadCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        bias: Tensor,
        labels: Tensor,
        groups: RowGroups,
        grad_weight: Tensor,
        grad_bias: Tensor,
    ) -> tuple[Tensor, Tensor]:
        if use_triton(features):
            features = features.contiguous()
        logits = group_logits(features, weight, bias, groups)
        if use_triton(features):
            losses, correct, log_sums = head_loss(logits, labels, groups.filled, len(groups))
            saved = [logits, log_sums]
        else:
            losses, correct, *saved = torch_loss(logits, labels, groups)
        ctx.save_for_backward(features, weight, labels, *saved)
        ctx.groups, ctx.grad_weight, ctx.grad_bias = groups, grad_weight, grad_bias
        ctx.mark_non_differentiable(correct)
        # Else backward would be given zeros as the gradient of the right answers.
        ctx.set_materialize_grads(False)
        return losses, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_losses is None:
            return (None,) * 7
        features, weight, labels, *saved = ctx.saved_tensors
        groups: RowGroups = ctx.groups
        shares = grad_losses * groups.inverse_sizes.to(grad_losses.dtype)
        if use_triton(features):
            rows = groups.chunks(product_tile(features).rows).rows
            grad_logits = head_loss_backward(saved[0], labels, saved[1], shares, rows, features)
        else:
            grad_logits = torch_loss_backward(saved[0], labels, shares[groups.row_group], features.dtype)
        grad_features = group_gradients(
            features, grad_logits, weight, groups, ctx.grad_weight, ctx.grad_bias, ctx.needs_input_grad[0]
        )
        return grad_features, *([None] * 6)


def check_heads(
    features: Tensor, weight: Tensor, bias: Tensor, groups: RowGroups, grad_weight: Tensor, grad_bias: Tensor
) -> None:
    """Raise ValueError unless the classifiers, their sinks and the groups fit features."""
    check_shape("features", features, (groups.rows, None))
    check_float("features", features)
    check_shape("weight", weight, (None, None, features.shape[1]))
    check_shape("bias", bias, weight.shape[:2])
    if groups.smallest_bank > weight.shape[0]:
        raise ValueError(f"groups: found slot {groups.smallest_bank - 1}, expected slots below {weight.shape[0]}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        check_like(name, tensor, "features", features)
        check_bank(name, tensor)
    check_device("groups", groups, "features", features)
    check_sink("grad_weight", grad_weight, weight, "features", features)
    check_sink("grad_bias", grad_bias, bias, "features", features)
