"""The mean loss of each group and the gradient of its logits, for `head_cross_entropy`: by Triton and by torch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from ..dispatch import launch, register
from ..groups import RowGroups
from .head_products import product_tile
from .row_tables import load_chunk, load_filled

SCHEMA = "head_loss(Tensor logits, Tensor labels, Tensor filled, int groups) -> (Tensor, Tensor, Tensor)"
BACKWARD_SCHEMA = (
    "head_loss_backward(Tensor logits, Tensor labels, Tensor log_sums, Tensor shares, Tensor chunks, "
    "Tensor features) -> Tensor"
)
BLOCK_ROWS = 16
BLOCK_CLASSES = 128


@triton.jit(do_not_specialize=["labels_ptr", "filled_ptr"])
def head_loss_kernel(
    logits_ptr,
    labels_ptr,
    losses_ptr,
    correct_ptr,
    log_sums_ptr,
    filled_ptr,
    CLASSES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program adds one group's losses, in the order of its rows."""
    start, end, _, group = load_filled(filled_ptr, tl.program_id(0))
    losses = tl.zeros((BLOCK_M,), tl.float32)
    correct = tl.zeros((BLOCK_M,), tl.int32)
    for first in range(start, end, BLOCK_M):
        row = first + tl.arange(0, BLOCK_M)
        row_mask = row < end
        offset = row.to(tl.int64) * CLASSES
        label = tl.load(labels_ptr + row, mask=row_mask, other=0)
        known = (label >= 0) & (label < CLASSES)
        target = tl.load(logits_ptr + offset + label, mask=row_mask & known, other=float("nan"))
        highest = tl.full((BLOCK_M,), -3.0e38, tl.float32)
        share = tl.zeros((BLOCK_M,), tl.float32)
        ahead = tl.zeros((BLOCK_M,), tl.int32)
        for n in range(0, CLASSES, BLOCK_N):
            column = (n + tl.arange(0, BLOCK_N))[None, :]
            mask = row_mask[:, None] & (column < CLASSES)
            logits = tl.load(logits_ptr + offset[:, None] + column, mask=mask, other=float("-inf"))
            above = tl.maximum(highest, tl.max(logits, axis=1))
            share *= tl.exp(highest - above)
            share += tl.sum(tl.exp(logits - above[:, None]), axis=1)
            highest = above
            # The first of equal logits wins, as in torch.argmax.
            beats = (logits > target[:, None]) | ((logits == target[:, None]) & (column < label[:, None]))
            ahead += tl.sum(beats.to(tl.int32), axis=1)
        log_sum = highest + tl.log(tl.where(row_mask, share, 1.0))
        tl.store(log_sums_ptr + row, log_sum, mask=row_mask)
        losses += tl.where(row_mask, log_sum - target, 0.0)
        correct += (row_mask & (ahead == 0) & (target == target)).to(tl.int32)
    tl.store(losses_ptr + group, tl.sum(losses, axis=0) / (end - start))
    tl.store(correct_ptr + group, tl.sum(correct, axis=0).to(tl.int64))


@triton.jit(do_not_specialize=["labels_ptr", "shares_ptr", "chunks_ptr"])
def head_loss_backward_kernel(
    logits_ptr,
    labels_ptr,
    log_sums_ptr,
    shares_ptr,
    grad_logits_ptr,
    chunks_ptr,
    CLASSES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program makes one tile of a chunk's gradient."""
    first, end, _, group, _ = load_chunk(chunks_ptr, tl.program_id(0))
    share = tl.load(shares_ptr + group)
    row = first + tl.arange(0, BLOCK_M)
    column = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    row_mask = row < end
    mask = row_mask[:, None] & (column < CLASSES)
    offset = row.to(tl.int64)[:, None] * CLASSES + column
    label = tl.load(labels_ptr + row, mask=row_mask, other=0)
    log_sum = tl.load(log_sums_ptr + row, mask=row_mask, other=0.0)
    gradient = tl.exp(tl.load(logits_ptr + offset, mask=mask, other=0.0) - log_sum[:, None])
    gradient = tl.where(column == label[:, None], gradient - 1.0, gradient) * share
    tl.store(grad_logits_ptr + offset, gradient.to(grad_logits_ptr.dtype.element_ty), mask=mask)


def _fake_loss(logits: Tensor, labels: Tensor, filled: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        logits.new_zeros(groups),
        logits.new_zeros(groups, dtype=torch.int64),
        logits.new_empty(logits.shape[0]),
    )


@register(SCHEMA, _fake_loss)
def head_loss(logits: Tensor, labels: Tensor, filled: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """(mean loss [groups], right answers [groups], log-sum-exp [samples]) of fp32 logits [samples, classes]."""
    losses, correct, log_sums = _fake_loss(logits, labels, filled, groups)
    launch(
        head_loss_kernel,
        (filled.shape[0],),
        logits,
        labels,
        losses,
        correct,
        log_sums,
        filled,
        CLASSES=logits.shape[1],
        BLOCK_M=BLOCK_ROWS,
        BLOCK_N=BLOCK_CLASSES,
        num_warps=4,
    )
    return losses, correct, log_sums


def _fake_loss_backward(
    logits: Tensor, labels: Tensor, log_sums: Tensor, shares: Tensor, chunks: Tensor, features: Tensor
) -> Tensor:
    return features.new_empty(logits.shape)


@register(BACKWARD_SCHEMA, _fake_loss_backward)
def head_loss_backward(
    logits: Tensor, labels: Tensor, log_sums: Tensor, shares: Tensor, chunks: Tensor, features: Tensor
) -> Tensor:
    """The gradient of the logits in the features' dtype; shares fp32 [groups]: loss gradient / samples."""
    tile = product_tile(features)
    grad_logits = features.new_empty(logits.shape)
    launch(
        head_loss_backward_kernel,
        (chunks.shape[0], triton.cdiv(logits.shape[1], tile.columns)),
        logits,
        labels,
        log_sums,
        shares,
        grad_logits,
        chunks,
        CLASSES=logits.shape[1],
        BLOCK_M=tile.rows,
        BLOCK_N=tile.columns,
        num_warps=4,
    )
    return grad_logits


def torch_loss(logits: Tensor, labels: Tensor, groups: RowGroups) -> tuple[Tensor, Tensor, Tensor]:
    """Mean loss and right answers of each group, and each sample's log-probabilities [samples, classes]."""
    log_probabilities = F.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=1)
    sample_losses = F.nll_loss(log_probabilities, labels, reduction="none")
    losses = sample_losses.new_zeros(len(groups)).index_add_(0, groups.row_group, sample_losses)
    correct = torch.zeros(len(groups), dtype=torch.int64)
    correct.index_add_(0, groups.row_group, (logits.argmax(1) == labels).long())
    return losses * groups.inverse_sizes.to(losses.dtype), correct, log_probabilities


def torch_loss_backward(log_probabilities: Tensor, labels: Tensor, shares: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of the logits [samples, classes]; shares [samples]: each sample's part of the gradient."""
    gradient = log_probabilities.exp().mul_(shares[:, None])
    gradient.scatter_add_(1, labels[:, None], shares.neg()[:, None])
    return gradient.to(dtype)
