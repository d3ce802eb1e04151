"""What one read of dY gives: dS = scale dY B_k, and the chunks' partial sums of dB_k = scale dY^T S.

A chunk of rows, counted from its group's start, has one writer for its fp32 partial sums: no atomics, and a client's
gradient depends on its own rows alone. `lora_grad_reduce` adds them up.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import launch, register
from .configs import MOST_LINEARS, ConfigTable, Tile, choose, gradient_chunk, low_rank_options
from .row_tables import load_chunk

SCHEMA = (
    "lora_grad_output(Tensor[] grad_y, Tensor[] lora_b, Tensor shrunk, Tensor chunks, Tensor(a!)? partials, "
    "int[] columns, float scale, Tensor? index, Tensor? column_scale) -> (Tensor, Tensor)"
)

CONFIGS: dict[str, dict[str, Tile]] = {
    "sm_80": {"narrow": Tile(256, 64, 1, 8, 2), "float": Tile(64, 32, 1, 4, 2)},
    "sm_90": {"narrow": Tile(512, 64, 1, 8, 2), "float": Tile(64, 32, 1, 4, 2)},
    "sm_100": {"narrow": Tile(256, 64, 1, 8, 3), "float": Tile(64, 32, 1, 4, 2)},
    "gfx942": {"narrow": Tile(128, 64, 1, 8, 2), "float": Tile(64, 32, 1, 4, 2)},
    "small": {"narrow": Tile(64, 64, 1, 4, 2), "float": Tile(64, 32, 1, 4, 2)},
    "interpreter": dict.fromkeys(("narrow", "float"), Tile(16, 32, 1, 4, 1)),
}

# Rows that are gathered and scaled pass through registers on their way to the product.
GATHER_CONFIGS: ConfigTable = CONFIGS | {
    "sm_80": CONFIGS["sm_80"] | {"narrow": Tile(128, 64, 1, 8, 2)},
    "sm_90": CONFIGS["sm_90"] | {"narrow": Tile(256, 64, 1, 8, 3)},
    "sm_100": CONFIGS["sm_100"] | {"narrow": Tile(128, 64, 1, 8, 3)},
}


@triton.jit
def _gradients(
    grad_y_ptr, lora_b_ptr, shrunk_ptr, grad_shrunk_ptr, partials_ptr, index_ptr, column_scale_ptr, rows_ptr,
    start, end, stream_rows, stride_row, scale,
    N: tl.constexpr, RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, RANKS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ONE_BLOCK: tl.constexpr,
    INDEXED: tl.constexpr, SCALED: tl.constexpr, TRAINED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dS and the partial sums of one adapter for the rows of one chunk."""
    column = tl.arange(0, BLOCK_N)
    rank = tl.arange(0, RANK_BLOCK)
    rank_mask = (rank < RANK)[None, :]
    factor_offset = column[:, None] * RANK + rank[None, :]
    for first in range(start, end, BLOCK_M):
        row = first + tl.arange(0, BLOCK_M)
        row_mask = (row < end)[:, None]
        row_offset = row.to(tl.int64)[:, None]
        narrow_offset = row_offset * RANKS + rank[None, :]
        if TRAINED:
            shrunk = tl.load(shrunk_ptr + narrow_offset, mask=row_mask & rank_mask, other=0.0)
        if INDEXED:
            source = tl.load(index_ptr + row, mask=row < end, other=-1)
            known = ((source >= 0) & (source < stream_rows))[:, None]
            grad_y_ptrs = grad_y_ptr + source[:, None] * stride_row + column[None, :]
        else:
            known = row_mask
            grad_y_ptrs = grad_y_ptr + row_offset * stride_row + column[None, :]
        grad_shrunk = tl.zeros((BLOCK_M, RANK_BLOCK), tl.float32)
        for n in range(0, N, BLOCK_N):
            inside = n + column < N
            grad_y = tl.load(grad_y_ptrs + n, mask=known & inside[None, :], other=0.0)
            if SCALED:
                factors = tl.load(column_scale_ptr + n + column, mask=inside, other=0.0).to(tl.float32)
                grad_y = (grad_y.to(tl.float32) * factors[None, :]).to(grad_y_ptr.dtype.element_ty)
            if INDEXED or SCALED:
                tl.store(rows_ptr + row_offset * N + (n + column)[None, :], grad_y, mask=row_mask & inside[None, :])
            factor_mask = inside[:, None] & rank_mask
            factor = tl.load(lora_b_ptr + n * RANK + factor_offset, mask=factor_mask, other=0.0)
            grad_shrunk = tl.dot(grad_y, factor, grad_shrunk, input_precision=PRECISION)
            if TRAINED:
                partial = tl.dot(tl.trans(grad_y), shrunk, input_precision=PRECISION) * scale
                partial_ptrs = partials_ptr + n * RANK + factor_offset
                if not ONE_BLOCK:
                    partial += tl.load(partial_ptrs, mask=factor_mask & (first > start), other=0.0)
                tl.store(partial_ptrs, partial, mask=factor_mask)
        grad_shrunk = (grad_shrunk * scale).to(grad_shrunk_ptr.dtype.element_ty)
        tl.store(grad_shrunk_ptr + narrow_offset, grad_shrunk, mask=row_mask & rank_mask)
        if not ONE_BLOCK:
            # The next rows' sums are added to what other threads may have stored.
            tl.debug_barrier()


@triton.jit(do_not_specialize=["chunks_ptr", "index_ptr", "stream_rows"])
def lora_grad_output_kernel(
    grad_y0_ptr,
    grad_y1_ptr,
    grad_y2_ptr,
    lora_b0_ptr,
    lora_b1_ptr,
    lora_b2_ptr,
    shrunk_ptr,
    grad_shrunk_ptr,
    partials_ptr,
    index_ptr,
    column_scale_ptr,
    rows_ptr,
    chunks_ptr,
    stream_rows,
    stride_row0,
    stride_row1,
    stride_row2,
    stride_slot,
    stride_chunk,
    column0,
    column1,
    column2,
    scale,
    N0: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    OUTPUTS: tl.constexpr,
    RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    INDEXED: tl.constexpr,
    SCALED: tl.constexpr,
    TRAINED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program for one chunk and one of the outputs."""
    chunk = tl.program_id(0)
    start, end, slot, _, _ = load_chunk(chunks_ptr, chunk)
    partials_ptr += chunk.to(tl.int64) * stride_chunk
    factors = slot * stride_slot
    if OUTPUTS == 1 or tl.program_id(1) == 0:
        _gradients(
            grad_y0_ptr, lora_b0_ptr + factors, shrunk_ptr, grad_shrunk_ptr, partials_ptr + column0,
            index_ptr, column_scale_ptr, rows_ptr, start, end, stream_rows, stride_row0, scale,
            N0, RANK, RANK_BLOCK, OUTPUTS * RANK, BLOCK_M, BLOCK_N, ONE_BLOCK, INDEXED, SCALED, TRAINED, PRECISION,
        )  # fmt: skip
    elif OUTPUTS == 2 or tl.program_id(1) == 1:
        _gradients(
            grad_y1_ptr, lora_b1_ptr + factors, shrunk_ptr + RANK, grad_shrunk_ptr + RANK, partials_ptr + column1,
            index_ptr, column_scale_ptr, rows_ptr, start, end, stream_rows, stride_row1, scale,
            N1, RANK, RANK_BLOCK, OUTPUTS * RANK, BLOCK_M, BLOCK_N, ONE_BLOCK, INDEXED, SCALED, TRAINED, PRECISION,
        )  # fmt: skip
    else:
        _gradients(
            grad_y2_ptr, lora_b2_ptr + factors, shrunk_ptr + 2 * RANK, grad_shrunk_ptr + 2 * RANK,
            partials_ptr + column2, index_ptr, column_scale_ptr, rows_ptr, start, end, stream_rows, stride_row2, scale,
            N2, RANK, RANK_BLOCK, OUTPUTS * RANK, BLOCK_M, BLOCK_N, ONE_BLOCK, INDEXED, SCALED, TRAINED, PRECISION,
        )  # fmt: skip


def _outputs(
    grad_y: list[Tensor], lora_b: list[Tensor], shrunk: Tensor, index: Tensor | None, column_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    rows = shrunk.shape[0]
    copied = rows if index is not None or column_scale is not None else 0
    return shrunk.new_empty(rows, shrunk.shape[1]), shrunk.new_empty(copied, grad_y[0].shape[1])


@register(
    SCHEMA,
    lambda grad_y, lora_b, shrunk, chunks, partials, columns, scale, index, column_scale: _outputs(
        grad_y, lora_b, shrunk, index, column_scale
    ),
)
def lora_grad_output(
    grad_y: list[Tensor],
    lora_b: list[Tensor],
    shrunk: Tensor,
    chunks: Tensor,
    partials: Tensor | None,
    columns: list[int],
    scale: float,
    index: Tensor | None,
    column_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """dS [rows, outputs * rank] of the gradients of one to three layers' outputs; their dB, in pieces, into `partials`.

    Args: grad_y: of each layer, [rows, out], of any row stride; with `index`, one: the gradient of a stream [stream
    rows, out], of which row i is `index[i]`. `column_scale` [out] multiplies it, too. lora_b: of each, [slots, out,
    rank], ranks up to NARROW_RANK, of one slot stride. shrunk: [rows, outputs * rank], S of each beside the other.
    chunks: `RowGroups.chunks(gradient_chunk(shrunk)).rows`. partials: fp32 [chunks, columns of a slot]; None where B is
    frozen. columns: at which column of it each layer's B begins.

    Returns:
        dS; and the gathered and scaled rows [rows, out], which are empty without `index` and `column_scale`.
    """
    count, rank = len(lora_b), lora_b[0].shape[2]
    gathers = index is not None or column_scale is not None
    tile = choose(GATHER_CONFIGS if gathers else CONFIGS, shrunk, rank)
    grad_shrunk, rows = _outputs(grad_y, lora_b, shrunk, index, column_scale)
    absent: list[Any] = [None] * (MOST_LINEARS - count)
    none = [0] * (MOST_LINEARS - count)
    launch(
        lora_grad_output_kernel,
        (chunks.shape[0], count),
        *grad_y,
        *absent,
        *lora_b,
        *absent,
        *(shrunk, grad_shrunk, grad_shrunk if partials is None else partials, index, column_scale, rows, chunks),
        grad_y[0].shape[0],
        *(grad.stride(0) for grad in grad_y),
        *none,
        lora_b[0].stride(0),
        0 if partials is None else partials.stride(0),
        *columns,
        *none,
        scale,
        N0=lora_b[0].shape[1],
        N1=lora_b[1].shape[1] if count > 1 else 0,
        N2=lora_b[2].shape[1] if count > 2 else 0,
        OUTPUTS=count,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.columns,
        ONE_BLOCK=tile.rows >= gradient_chunk(shrunk),
        INDEXED=index is not None,
        SCALED=column_scale is not None,
        TRAINED=partials is not None,
        **low_rank_options(shrunk, rank),
        **tile.options,
    )
    return grad_shrunk, rows
