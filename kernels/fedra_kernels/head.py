"""Per-client classifier with cross entropy: grouped logits, one mean loss per client."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

from .checks import FLOAT_DTYPES, check_bank, check_device, check_dtype, check_index, check_like, check_shape
from .groups import RowGroups, add_to_bank, bank_rows


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
        labels: int64 [samples].
        groups: the samples of each slot; its scales are not used.
        grad_weight, grad_bias: gradient sinks shaped as weight and bias; backward adds into the rows of the
            touched slots, each times the gradient of its group's loss.

    Returns:
        losses [groups], fp32 (fp64 for fp64 features), differentiable in features; correct, int64 [groups].
        A group without samples has loss 0. Where features need no gradient, `weight.requires_grad` makes
        backward run for the sinks.

    Raises:
        ValueError: a shape, dtype, device or group table does not fit.
    """
    _check(features, weight, bias, labels, groups, grad_weight, grad_bias)
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
        ctx: FunctionCtx,
        features: Tensor,
        weight: Tensor,
        bias: Tensor,
        labels: Tensor,
        groups: RowGroups,
        grad_weight: Tensor,
        grad_bias: Tensor,
    ) -> tuple[Tensor, Tensor]:
        classes = weight.shape[1]
        logits = features.new_empty(len(features), classes)
        for run in groups.runs:
            torch.baddbmm(
                bank_rows(bias, run.slots)[:, None],
                features[run.rows].view(run.count, run.size, -1),
                bank_rows(weight, run.slots).transpose(1, 2),
                out=logits[run.rows].view(run.count, run.size, classes),
            )
        dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
        log_probabilities = torch.log_softmax(logits, dim=1, dtype=dtype)
        sample_losses = -log_probabilities.gather(1, labels[:, None])[:, 0]
        shares = 1.0 / torch.tensor(groups.sizes, dtype=dtype, device=features.device).clamp_(min=1)
        group_of = groups.row_group
        losses = torch.zeros_like(shares).index_add_(0, group_of, sample_losses).mul_(shares)
        right = (logits.argmax(1) == labels).long()
        correct = torch.zeros(len(groups), dtype=torch.int64, device=features.device)
        correct.index_add_(0, group_of, right)
        ctx.save_for_backward(features, weight, labels, log_probabilities, shares)
        ctx.groups, ctx.grad_weight, ctx.grad_bias = groups, grad_weight, grad_bias
        ctx.mark_non_differentiable(correct)
        return losses, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_losses: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        features, weight, labels, log_probabilities, shares = ctx.saved_tensors
        groups: RowGroups = ctx.groups
        grad_logits = log_probabilities.exp()
        grad_logits.scatter_add_(1, labels[:, None], grad_logits.new_full((len(labels), 1), -1.0))
        grad_logits.mul_((grad_losses * shares)[groups.row_group, None])
        grad_logits = grad_logits.to(features.dtype)
        grad_features = torch.empty_like(features) if ctx.needs_input_grad[0] else None
        for run in groups.runs:
            run_grad = grad_logits[run.rows].view(run.count, run.size, -1)
            run_features = features[run.rows].view(run.count, run.size, -1)
            add_to_bank(ctx.grad_weight, run.slots, torch.bmm(run_grad.transpose(1, 2), run_features))
            add_to_bank(ctx.grad_bias, run.slots, run_grad.sum(1, dtype=ctx.grad_bias.dtype))
            if grad_features is not None:
                torch.bmm(
                    run_grad,
                    bank_rows(weight, run.slots),
                    out=grad_features[run.rows].view(run.count, run.size, -1),
                )
        return grad_features, *([None] * 6)


def _check(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    groups: RowGroups,
    grad_weight: Tensor,
    grad_bias: Tensor,
) -> None:
    check_shape("features", features, (groups.rows, None))
    check_dtype("features", features, FLOAT_DTYPES)
    check_shape("weight", weight, (None, None, features.shape[1]))
    check_shape("bias", bias, weight.shape[:2])
    check_shape("labels", labels, (groups.rows,))
    check_index("labels", labels, "weight", weight, dim=1)
    check_shape("grad_weight", grad_weight, weight.shape)
    check_shape("grad_bias", grad_bias, bias.shape)
    if groups.smallest_bank > weight.shape[0]:
        raise ValueError(
            f"groups: found slot {groups.smallest_bank - 1}, expected slots below {weight.shape[0]}"
        )
    for name, tensor in (("weight", weight), ("bias", bias)):
        check_like(name, tensor, "features", features)
    check_device("groups", groups.slots, "features", features)
    for name, sink in (("grad_weight", grad_weight), ("grad_bias", grad_bias)):
        check_device(name, sink, "features", features)
        check_dtype(name, sink, (features.dtype, torch.float32, torch.float64))
    for name, bank in (("weight", weight), ("bias", bias), ("grad_weight", grad_weight)):
        check_bank(name, bank)
