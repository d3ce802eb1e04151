"""Add a block's compact rows to the residual stream, in place. Row numbers are unique: no atomics."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._kernels.checks import check_index, check_like, check_shape, check_stream, stream_rows
from .dispatch import in_place, launch, register, use_triton

SCHEMA = "scatter_add_(Tensor(a!) residual, Tensor y, Tensor index, Tensor? scale) -> ()"
BLOCK_ROWS = 16
BLOCK_COLUMNS = 256


def scatter_add(residual: Tensor, y: Tensor, index: Tensor, scale: Tensor | None = None) -> Tensor:
    """residual[index] += scale * y, in place; returns residual.

    Args:
        residual: [rows of the stream, features] or [samples, ..., features], whose leading dimensions, flattened,
            are the rows of the stream; contiguous. Updated in place, as autograd allows for any tensor that is not
            a leaf. Give the stream itself, not a view of it: for a view, autograd copies the whole gradient.
        y: [rows, features].
        index: int64 [rows], unique rows of the stream. On a GPU its values are not checked: a row outside
            the stream is left out.
        scale: [features], frozen (LayerScale), or None for 1.

    Raises:
        ValueError: a shape, dtype, device or row number does not fit.
    """
    check_stream("residual", residual)
    check_index("index", index, "residual", stream_rows(residual.detach()))
    check_shape("y", y, (index.shape[0], residual.shape[-1]))
    check_like("y", y, "residual", residual)
    if scale is not None:
        check_shape("scale", scale, (residual.shape[-1],))
        check_like("scale", scale, "residual", residual)
    added: Tensor = _ScatterAdd.apply(residual, y, index, scale)
    return added


def scatter_add_reference(residual: Tensor, y: Tensor, index: Tensor, scale: Tensor | None = None) -> Tensor:
    """The same sum in a new tensor."""
    total = stream_rows(residual).index_add(0, index, y if scale is None else y * scale)
    return total.view(residual.shape)


class _ScatterAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, residual: Tensor, y: Tensor, index: Tensor, scale: Tensor | None) -> Tensor:
        ctx.mark_dirty(residual)
        ctx.save_for_backward(index, scale)
        rows = stream_rows(residual)
        if use_triton(residual):
            scatter_add_rows(rows, y.contiguous(), index, scale)
        else:
            rows.index_add_(0, index, y if scale is None else y * scale)
        return residual

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        index, scale = ctx.saved_tensors
        grad_y = None
        if ctx.needs_input_grad[1]:
            grad_y = stream_rows(grad.contiguous()).index_select(0, index)
            if scale is not None:
                grad_y.mul_(scale)
        return grad, grad_y, None, None


@triton.jit(do_not_specialize=["index_ptr", "rows", "stream_rows"])
def scatter_add_kernel(
    residual_ptr,
    y_ptr,
    index_ptr,
    scale_ptr,
    rows,
    stream_rows,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SCALED: tl.constexpr,
):
    """One program adds some columns of some rows."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    target = tl.load(index_ptr + row, mask=row < rows, other=-1)
    inside = (target >= 0) & (target < stream_rows)
    mask = inside[:, None] & (column < D)[None, :]
    y = tl.load(y_ptr + row[:, None] * D + column[None, :], mask=mask, other=0.0).to(tl.float32)
    if SCALED:
        y *= tl.load(scale_ptr + column, mask=column < D, other=0.0).to(tl.float32)[None, :]
    residual_ptrs = residual_ptr + target[:, None] * D + column[None, :]
    total = tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32) + y
    tl.store(residual_ptrs, total.to(residual_ptr.dtype.element_ty), mask=mask)


@register(SCHEMA, in_place)
def scatter_add_rows(residual: Tensor, y: Tensor, index: Tensor, scale: Tensor | None) -> None:
    """residual[index] += scale * y for contiguous residual [stream rows, D] and y [rows, D]."""
    rows, features = y.shape
    launch(
        scatter_add_kernel,
        (triton.cdiv(rows, BLOCK_ROWS), triton.cdiv(features, BLOCK_COLUMNS)),
        residual,
        y,
        index,
        scale,
        rows,
        residual.shape[0],
        D=features,
        BLOCK_M=BLOCK_ROWS,
        BLOCK_D=BLOCK_COLUMNS,
        SCALED=scale is not None,
        num_warps=4,
    )
