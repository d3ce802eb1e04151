"""Move samples between the full batch and the compact rows of a block. Row numbers are unique: no atomics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .checks import check_index, check_like, check_shape


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """x[index]: x [samples, ...], index int64 [rows] of unique sample numbers -> [rows, ...]."""
    check_index("index", index, "x", x)
    gathered: Tensor = _GatherRows.apply(x, index)
    return gathered


def scatter_rows(x: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    """A copy of x [samples, ...] whose rows `index` are replaced by rows [len(index), ...]."""
    check_index("index", index, "x", x)
    check_shape("rows", rows, (index.shape[0], *x.shape[1:]))
    check_like("rows", rows, "x", x)
    scattered: Tensor = _ScatterRows.apply(x, rows, index)
    return scattered


def gather_rows_reference(x: Tensor, index: Tensor) -> Tensor:
    return x[index]


def scatter_rows_reference(x: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    return x.index_copy(0, index, rows)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.shape = x.shape
        return x.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        return grad.new_zeros(ctx.shape).index_copy_(0, index, grad), None


class _ScatterRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        return x.index_copy(0, index, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        grad_x = grad.index_fill(0, index, 0.0) if ctx.needs_input_grad[0] else None
        grad_rows = grad.index_select(0, index) if ctx.needs_input_grad[1] else None
        return grad_x, grad_rows, None
