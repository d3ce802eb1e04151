"""The torch path of `lora_linear`: batched products over runs of equal group sizes.

The low-rank factors are kept with the rank in front, S^T = A x^T and dS^T = B^T dY^T: batched products whose
result has few columns are several times slower.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..groups import RowGroups, Run, add_to_bank, bank_rows, grouped


def shrink(x: Tensor, lora_a: Tensor, groups: RowGroups, keep: Tensor | None) -> Tensor:
    """drop(x) A_k^T as a [rows, rank] buffer; inside a run it is laid out as [groups, rank, size]."""
    shrunk = x.new_empty(x.shape[0], lora_a.shape[1])
    dropped = x if keep is None else x * keep
    for run in groups.runs:
        factor = bank_rows(lora_a, run.slots)
        torch.bmm(factor, grouped(dropped, run).transpose(1, 2), out=rank_major(shrunk, run))
    return shrunk


def expand(y: Tensor, shrunk: Tensor, lora_b: Tensor, groups: RowGroups, scale: float) -> None:
    """Add scale S B_k^T to the rows of group k of y [rows, out], in place."""
    for run in groups.runs:
        left = rank_major(shrunk, run).transpose(1, 2)
        right = bank_rows(lora_b, run.slots).transpose(1, 2)
        grouped(y, run).baddbmm_(left, right, alpha=scale)


def backward(
    grad_y: Tensor,
    grad_x: Tensor | None,
    x: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    shrunk: Tensor | None,
    keep: Tensor | None,
    groups: RowGroups,
    scale: float,
    grad_a: Tensor | None,
    grad_b: Tensor | None,
) -> None:
    """Add dA and dB, from x and shrunk, into the given sinks, and to grad_x, if given, what x gets through A."""
    dropped = x if x is None or keep is None else x * keep
    for run in groups.runs:
        run_grad_y = grouped(grad_y, run)
        if grad_b is not None and shrunk is not None:
            scaled_shrunk = rank_major(shrunk, run) * scale
            add_to_bank(grad_b, run.slots, torch.bmm(scaled_shrunk, run_grad_y).transpose(1, 2))
        if grad_a is None and grad_x is None:
            continue
        factor_b = bank_rows(lora_b, run.slots).transpose(1, 2)
        grad_shrunk = torch.bmm(factor_b, run_grad_y.transpose(1, 2)).mul_(scale)
        if grad_a is not None and dropped is not None:
            # A fused baddbmm_ into the strided bank would go slot by slot.
            add_to_bank(grad_a, run.slots, torch.bmm(grad_shrunk, grouped(dropped, run)))
        if grad_x is None:
            continue
        left, factor_a = grad_shrunk.transpose(1, 2), bank_rows(lora_a, run.slots)
        if keep is None:
            grouped(grad_x, run).baddbmm_(left, factor_a)
        else:
            grouped(grad_x, run).addcmul_(torch.bmm(left, factor_a), grouped(keep, run))


def rank_major(shrunk: Tensor, run: Run) -> Tensor:
    """The run's rows of a buffer [rows, rank] that is laid out as [groups, rank, size], a view."""
    return shrunk[run.rows].view(run.count, shrunk.shape[1], run.size)
