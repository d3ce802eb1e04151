"""Triton kernel of the input gradient of `gather_norm`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .dispatch import in_place, launch, register

SCHEMA = (
    "gather_norm_backward(Tensor grad_x, Tensor index, Tensor weight, Tensor rows, Tensor mean, "
    "Tensor inverse, bool rms, Tensor(a!) grad_hidden) -> ()"
)
BLOCK_ROWS = 16
BLOCK_COLUMNS = 128


@triton.jit(do_not_specialize=["index_ptr", "rows", "stream_rows"])
def gather_norm_backward_kernel(
    grad_x_ptr,
    index_ptr,
    weight_ptr,
    rows_ptr,
    mean_ptr,
    inverse_ptr,
    grad_hidden_ptr,
    rows,
    stream_rows,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    RMS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = row < rows
    row_offset = row[:, None] * D
    mean = tl.load(mean_ptr + row, mask=row_mask, other=0.0)[:, None]
    inverse = tl.load(inverse_ptr + row, mask=row_mask, other=0.0)[:, None]
    piece = tl.arange(0, BLOCK_D)
    grad_sum = tl.zeros((BLOCK_M,), tl.float32)
    grad_dot = tl.zeros((BLOCK_M,), tl.float32)
    for d in range(0, D, BLOCK_D):
        inside = (d + piece < D)[None, :]
        offset = row_offset + (d + piece)[None, :]
        mask = row_mask[:, None] & inside
        weight = tl.load(weight_ptr + (d + piece)[None, :], mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_x_ptr + offset, mask=mask, other=0.0).to(tl.float32) * weight
        hidden = tl.load(rows_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        grad_dot += tl.sum(grad * (hidden - mean) * inverse, axis=1)
        grad_sum += tl.sum(grad, axis=1)
    target = tl.load(index_ptr + row, mask=row_mask, other=-1)
    inside_stream = (target >= 0) & (target < stream_rows)
    mean_grad = (grad_sum / D)[:, None]
    mean_dot = (grad_dot / D)[:, None]
    for d in range(0, D, BLOCK_D):
        inside = (d + piece < D)[None, :]
        offset = row_offset + (d + piece)[None, :]
        mask = row_mask[:, None] & inside
        weight = tl.load(weight_ptr + (d + piece)[None, :], mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_x_ptr + offset, mask=mask, other=0.0).to(tl.float32) * weight
        hidden = tl.load(rows_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        grad -= (hidden - mean) * inverse * mean_dot
        if not RMS:
            grad -= mean_grad
        grad *= inverse
        target_ptrs = grad_hidden_ptr + target[:, None] * D + (d + piece)[None, :]
        tl.store(target_ptrs, grad.to(grad_hidden_ptr.dtype.element_ty), mask=inside_stream[:, None] & inside)


@register(SCHEMA, in_place)
def gather_norm_backward(
    grad_x: Tensor,
    index: Tensor,
    weight: Tensor,
    rows: Tensor,
    mean: Tensor,
    inverse: Tensor,
    rms: bool,
    grad_hidden: Tensor,
) -> None:
    """Write the gradient of the gathered rows into the rows `index` of grad_hidden."""
    launch(
        gather_norm_backward_kernel,
        (triton.cdiv(rows.shape[0], BLOCK_ROWS),),
        grad_x,
        index,
        weight,
        rows,
        mean,
        inverse,
        grad_hidden,
        rows.shape[0],
        grad_hidden.shape[0],
        D=rows.shape[1],
        BLOCK_M=BLOCK_ROWS,
        BLOCK_D=BLOCK_COLUMNS,
        RMS=rms,
        num_warps=4,
    )
