"""The torch path of `head_cross_entropy`: batched products over runs of equal group sizes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .groups import RowGroups, add_to_bank, bank_rows, grouped


def logits(features: Tensor, weight: Tensor, bias: Tensor, groups: RowGroups) -> Tensor:
    """[samples, classes] under each group's own classifier."""
    result = features.new_empty(len(features), weight.shape[1])
    for run in groups.runs:
        torch.baddbmm(
            bank_rows(bias, run.slots)[:, None],
            grouped(features, run),
            bank_rows(weight, run.slots).transpose(1, 2),
            out=grouped(result, run),
        )
    return result


def loss(logits: Tensor, labels: Tensor, groups: RowGroups) -> tuple[Tensor, Tensor, Tensor]:
    """Mean loss and right answers of each group, and each sample's log-probabilities [samples, classes]."""
    log_probabilities = F.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=1)
    sample_losses = F.nll_loss(log_probabilities, labels, reduction="none")
    losses = sample_losses.new_zeros(len(groups)).index_add_(0, groups.row_group, sample_losses)
    correct = torch.zeros(len(groups), dtype=torch.int64)
    correct.index_add_(0, groups.row_group, (logits.argmax(1) == labels).long())
    return losses * groups.inverse_sizes.to(losses.dtype), correct, log_probabilities


def loss_backward(log_probabilities: Tensor, labels: Tensor, shares: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of the logits [samples, classes]; shares [samples]: each sample's part of the gradient."""
    gradient = log_probabilities.exp().mul_(shares[:, None])
    gradient.scatter_add_(1, labels[:, None], shares.neg()[:, None])
    return gradient.to(dtype)


def add_grads(features: Tensor, grad_logits: Tensor, groups: RowGroups, grad_weight: Tensor, grad_bias: Tensor) -> None:
    """Add the gradients of the classifiers into the sinks."""
    for run in groups.runs:
        run_grad = grouped(grad_logits, run)
        product = torch.bmm(run_grad.transpose(1, 2), grouped(features, run))
        add_to_bank(grad_weight, run.slots, product)
        add_to_bank(grad_bias, run.slots, run_grad.sum(1, dtype=grad_bias.dtype))


def grad_features(grad_logits: Tensor, weight: Tensor, groups: RowGroups) -> Tensor:
    """The gradient of the features [samples, in]."""
    result = grad_logits.new_empty(len(grad_logits), weight.shape[2])
    for run in groups.runs:
        factor = bank_rows(weight, run.slots)
        torch.bmm(grouped(grad_logits, run), factor, out=grouped(result, run))
    return result
