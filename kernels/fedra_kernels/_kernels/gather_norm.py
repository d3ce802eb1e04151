"""The norm of rows of the residual stream, forward and backward. Rows are read in pieces: a whole row in registers
would spill.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import in_place, launch, register
from .configs import MOST_LINEARS, ConfigTable, Tile, choose, low_rank_options
from .counter_hash import keep_entries, row_seeds
from .row_tables import load_chunk

FORWARD_SCHEMA = (
    "gather_norm_forward(Tensor hidden, Tensor? index, Tensor weight, Tensor? bias, float eps, bool rms, "
    "Tensor[] lora_a, Tensor? chunks, Tensor[] keys, int threshold) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
BACKWARD_SCHEMA = (
    "gather_norm_backward(Tensor grad_x, Tensor weight, Tensor rows, Tensor mean, Tensor inverse, bool rms, "
    "Tensor residual, Tensor? residual_index, Tensor(a!) grad_hidden, Tensor? index) -> ()"
)
BACKWARD_ROWS = 16
BACKWARD_COLUMNS = 128

CONFIGS: ConfigTable = {
    "sm_80": {"narrow": Tile(64, 64, 1, 8, 2), "float": Tile(32, 32, 1, 4, 2)},
    "sm_90": {"narrow": Tile(64, 64, 1, 4, 2), "float": Tile(32, 32, 1, 4, 2)},
    "sm_100": {"narrow": Tile(64, 64, 1, 4, 2), "float": Tile(32, 32, 1, 4, 2)},
    "gfx942": {"narrow": Tile(64, 64, 1, 8, 2), "float": Tile(32, 32, 1, 4, 2)},
    "small": {"narrow": Tile(64, 64, 1, 8, 2), "float": Tile(32, 32, 1, 4, 2)},
    "interpreter": dict.fromkeys(("narrow", "float"), Tile(16, 32, 1, 4, 1)),
}


def norm_tile(hidden: Tensor, lora_a: Sequence[Tensor]) -> Tile:
    """The tile of `gather_norm_forward`."""
    return choose(CONFIGS, hidden, lora_a[0].shape[1] if lora_a else 1)


@triton.jit
def _shrink_piece(
    x, total, factor_ptr, rank, column, seeds, threshold,
    D: tl.constexpr, RANK: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """total + drop(x) A^T for one piece of the columns."""
    mask = (rank < RANK)[None, :] & (column < D)[:, None]
    factor = tl.load(factor_ptr + rank[None, :] * D + column[:, None], mask=mask, other=0.0)
    if DROPOUT:
        x = tl.where(keep_entries(seeds, column, threshold), x, 0.0)
    return tl.dot(x, factor, total, input_precision=PRECISION)


@triton.jit(do_not_specialize=["index_ptr", "chunks_ptr", "keys0_ptr", "keys1_ptr", "keys2_ptr", "rows", "stream_rows"])
def gather_norm_kernel(
    hidden_ptr,
    index_ptr,
    weight_ptr,
    bias_ptr,
    x_ptr,
    rows_ptr,
    mean_ptr,
    inverse_ptr,
    chunks_ptr,
    a0_ptr,
    a1_ptr,
    a2_ptr,
    shrunk_ptr,
    keys0_ptr,
    keys1_ptr,
    keys2_ptr,
    rows,
    stream_rows,
    stride_slot0,
    stride_slot1,
    stride_slot2,
    eps,
    threshold,
    D: tl.constexpr,
    RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    RMS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    INDEXED: tl.constexpr,
    SHRINKS: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program normalizes one block of rows: once over their pieces for the moments, once for x and each S."""
    program = tl.program_id(0)
    if SHRINKS > 0:
        first, end, slot, group, group_start = load_chunk(chunks_ptr, program)
    else:
        first = program.to(tl.int64) * BLOCK_M
        end = rows
    row = first + tl.arange(0, BLOCK_M)
    row_mask = row < end
    row_offset = row.to(tl.int64)[:, None] * D
    if INDEXED:
        source = tl.load(index_ptr + row, mask=row_mask, other=0)
        known = (source >= 0) & (source < stream_rows)
        source_ptrs = hidden_ptr + source[:, None] * D
    else:
        known = row_mask
        source_ptrs = hidden_ptr + row_offset
    piece = tl.arange(0, BLOCK_D)

    # Mean and squared deviations of the pieces, combined as in Chan, Golub and LeVeque (1979).
    mean = tl.zeros((BLOCK_M,), tl.float32)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    for d in range(0, D, BLOCK_D):
        inside = d + piece < D
        mask = (row_mask & known)[:, None] & inside[None, :]
        hidden = tl.load(source_ptrs + (d + piece)[None, :], mask=mask, other=0.0)
        if INDEXED:
            save_mask = row_mask[:, None] & inside[None, :]
            tl.store(rows_ptr + row_offset + (d + piece)[None, :], hidden, mask=save_mask)
        values = hidden.to(tl.float32)
        if RMS:
            squares += tl.sum(values * values, axis=1)
        else:
            size = tl.minimum(BLOCK_D, D - d) * 1.0
            piece_mean = tl.sum(values, axis=1) / size
            centered = tl.where(inside[None, :], values - piece_mean[:, None], 0.0)
            delta = piece_mean - mean
            mean += delta * (size / (d + size))
            squares += tl.sum(centered * centered, axis=1) + delta * delta * (d * size / (d + size))
    inverse = 1.0 / tl.sqrt(squares / D + eps)
    inverse = tl.where(known, inverse, float("nan"))
    tl.store(mean_ptr + row, mean, mask=row_mask)
    tl.store(inverse_ptr + row, inverse, mask=row_mask)

    rank = tl.arange(0, RANK_BLOCK)
    total0 = tl.zeros((BLOCK_M, RANK_BLOCK), tl.float32)
    total1 = tl.zeros((BLOCK_M, RANK_BLOCK), tl.float32)
    total2 = tl.zeros((BLOCK_M, RANK_BLOCK), tl.float32)
    seeds0 = tl.zeros((BLOCK_M,), tl.uint32)
    seeds1 = tl.zeros((BLOCK_M,), tl.uint32)
    seeds2 = tl.zeros((BLOCK_M,), tl.uint32)
    if DROPOUT:
        seeds0 = row_seeds(keys0_ptr, group, row - group_start)
        if SHRINKS > 1:
            seeds1 = row_seeds(keys1_ptr, group, row - group_start)
        if SHRINKS > 2:
            seeds2 = row_seeds(keys2_ptr, group, row - group_start)
    for d in range(0, D, BLOCK_D):
        column = d + piece
        inside = column < D
        mask = row_mask[:, None] & inside[None, :]
        hidden = tl.load(source_ptrs + column[None, :], mask=mask & known[:, None], other=0.0).to(tl.float32)
        values = (hidden - mean[:, None]) * inverse[:, None]
        values *= tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
        if HAS_BIAS:
            values += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
        x = values.to(x_ptr.dtype.element_ty)
        tl.store(x_ptr + row_offset + column[None, :], x, mask=mask)
        if SHRINKS > 0:
            total0 = _shrink_piece(
                x, total0, a0_ptr + slot * stride_slot0, rank, column, seeds0, threshold, D, RANK, DROPOUT, PRECISION
            )
        if SHRINKS > 1:
            total1 = _shrink_piece(
                x, total1, a1_ptr + slot * stride_slot1, rank, column, seeds1, threshold, D, RANK, DROPOUT, PRECISION
            )
        if SHRINKS > 2:
            total2 = _shrink_piece(
                x, total2, a2_ptr + slot * stride_slot2, rank, column, seeds2, threshold, D, RANK, DROPOUT, PRECISION
            )
    shrunk_ptrs = shrunk_ptr + row.to(tl.int64)[:, None] * (SHRINKS * RANK) + rank[None, :]
    mask = row_mask[:, None] & (rank < RANK)[None, :]
    if SHRINKS > 0:
        tl.store(shrunk_ptrs, total0.to(shrunk_ptr.dtype.element_ty), mask=mask)
    if SHRINKS > 1:
        tl.store(shrunk_ptrs + RANK, total1.to(shrunk_ptr.dtype.element_ty), mask=mask)
    if SHRINKS > 2:
        tl.store(shrunk_ptrs + 2 * RANK, total2.to(shrunk_ptr.dtype.element_ty), mask=mask)


def _outputs(hidden: Tensor, index: Tensor | None, lora_a: list[Tensor]) -> tuple[Tensor, ...]:
    rows, features = len(hidden if index is None else index), hidden.shape[1]
    return (
        hidden.new_empty(rows, features),
        hidden.new_empty(0 if index is None else rows, features),
        hidden.new_empty(rows, dtype=torch.float32),
        hidden.new_empty(rows, dtype=torch.float32),
        hidden.new_empty(rows, sum(bank.shape[1] for bank in lora_a)),
    )


@register(
    FORWARD_SCHEMA,
    lambda hidden, index, weight, bias, eps, rms, lora_a, *_: _outputs(hidden, index, lora_a),
)
def gather_norm_forward(
    hidden: Tensor,
    index: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    lora_a: list[Tensor],
    chunks: Tensor | None,
    keys: list[Tensor],
    threshold: int,
) -> tuple[Tensor, ...]:
    """x = norm(hidden[index]), the rows it has read, their means and inverse deviations, and S of each adapter.

    Args:
        index: int64 [rows]; None for all of hidden [rows, D] in their order, and then the second result is empty. A row
            outside hidden becomes NaN.
        lora_a: up to three A banks [slots, rank, D]; S is [rows, banks * rank], one beside the other.
        chunks: `RowGroups.chunks(norm_tile(hidden, lora_a).rows).rows` with lora_a, else None.
        keys: int64 [groups] for each of lora_a, or none at all.
    """
    tile = norm_tile(hidden, lora_a)
    outputs = _outputs(hidden, index, lora_a)
    x, rows, mean, inverse, shrunk = outputs
    absent = [None] * (MOST_LINEARS - len(lora_a))
    programs = triton.cdiv(x.shape[0], tile.rows) if chunks is None else chunks.shape[0]
    launch(
        gather_norm_kernel,
        (programs,),
        *(hidden, index, weight, bias, x, rows, mean, inverse, chunks),
        *lora_a,
        *absent,
        shrunk,
        *keys,
        *([None] * (MOST_LINEARS - len(keys))),
        x.shape[0],
        hidden.shape[0],
        *(bank.stride(0) for bank in lora_a),
        *(0 for _ in absent),
        eps,
        threshold,
        D=hidden.shape[1],
        BLOCK_M=tile.rows,
        BLOCK_D=tile.columns,
        RMS=rms,
        HAS_BIAS=bias is not None,
        INDEXED=index is not None,
        SHRINKS=len(lora_a),
        DROPOUT=bool(keys),
        **low_rank_options(hidden, lora_a[0].shape[1] if lora_a else 1),
        **tile.options,
    )
    return outputs


@triton.jit(do_not_specialize=["residual_index_ptr", "index_ptr", "rows", "residual_rows", "stream_rows"])
def gather_norm_backward_kernel(
    grad_x_ptr,
    weight_ptr,
    rows_ptr,
    mean_ptr,
    inverse_ptr,
    residual_ptr,
    residual_index_ptr,
    grad_hidden_ptr,
    index_ptr,
    rows,
    residual_rows,
    stream_rows,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    RMS: tl.constexpr,
    RESIDUAL_INDEXED: tl.constexpr,
    INDEXED: tl.constexpr,
):
    """One program makes the gradient of one block of rows."""
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
    written, target = row_mask, row
    if INDEXED:
        target = tl.load(index_ptr + row, mask=row_mask, other=-1)
        written = (target >= 0) & (target < stream_rows)
    known, source = row_mask, row
    if RESIDUAL_INDEXED:
        source = tl.load(residual_index_ptr + row, mask=row_mask, other=-1)
        known = (source >= 0) & (source < residual_rows)
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
        residual_ptrs = residual_ptr + source[:, None] * D + (d + piece)[None, :]
        grad += tl.load(residual_ptrs, mask=known[:, None] & inside, other=0.0).to(tl.float32)
        target_ptrs = grad_hidden_ptr + target[:, None] * D + (d + piece)[None, :]
        tl.store(target_ptrs, grad.to(grad_hidden_ptr.dtype.element_ty), mask=written[:, None] & inside)


@register(BACKWARD_SCHEMA, in_place)
def gather_norm_backward(
    grad_x: Tensor,
    weight: Tensor,
    rows: Tensor,
    mean: Tensor,
    inverse: Tensor,
    rms: bool,
    residual: Tensor,
    residual_index: Tensor | None,
    grad_hidden: Tensor,
    index: Tensor | None,
) -> None:
    """grad_hidden[index] = residual[residual_index] + the gradient of the rows that the norm has read.

    Args:
        grad_x, rows: [rows, D]; mean, inverse: fp32 [rows].
        residual: [residual rows, D], what bypasses the norm.
        grad_hidden: [stream rows, D]; other rows stay as they are.
        index, residual_index: int64 [rows], unique; None for row i itself. Rows outside are left out.
    """
    launch(
        gather_norm_backward_kernel,
        (triton.cdiv(rows.shape[0], BACKWARD_ROWS),),
        grad_x,
        weight,
        rows,
        mean,
        inverse,
        residual,
        residual_index,
        grad_hidden,
        index,
        rows.shape[0],
        residual.shape[0],
        grad_hidden.shape[0],
        D=rows.shape[1],
        BLOCK_M=BACKWARD_ROWS,
        BLOCK_D=BACKWARD_COLUMNS,
        RMS=rms,
        RESIDUAL_INDEXED=residual_index is not None,
        INDEXED=index is not None,
        num_warps=4,
    )
