"""Backward of an activation, which also sums up gradients of the layers around it.

These are dA of the layer that has read the activation's output y, which is computed anew, so that it need not be kept,
and dB of the layer that has made its input.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import dot_precision, in_place, launch, register
from .activation import sigmoid
from .configs import ConfigTable, Tile, choose, rank_block
from .counter_hash import keep_entries, row_seeds
from .row_tables import load_chunk

SCHEMA = (
    "activation_gradient(str kind, Tensor grad_y, Tensor x, Tensor? up, Tensor(a!) grad_x, Tensor(b!)? grad_up, "
    "Tensor chunks, Tensor(c!)? partials, Tensor? grad_shrunk, int column_a, Tensor? keys, int threshold, "
    "Tensor? shrunk, int column_b, float scale) -> ()"
)

CONFIGS: ConfigTable = {
    "sm_80": {"narrow": Tile(32, 64, 1, 4, 2), "wide": Tile(64, 64, 1, 8, 2), "float": Tile(32, 32, 1, 4, 2)},
    "sm_90": {"narrow": Tile(64, 128, 1, 8, 3), "wide": Tile(64, 64, 1, 8, 3), "float": Tile(32, 32, 1, 4, 2)},
    "sm_100": {"narrow": Tile(64, 128, 1, 8, 3), "wide": Tile(64, 64, 1, 8, 2), "float": Tile(32, 32, 1, 4, 2)},
    "gfx942": {"narrow": Tile(64, 64, 1, 8, 2), "wide": Tile(32, 64, 1, 4, 2), "float": Tile(32, 32, 1, 4, 2)},
    "small": {"narrow": Tile(32, 64, 1, 4, 2), "wide": Tile(32, 64, 1, 8, 2), "float": Tile(32, 32, 1, 4, 2)},
    "interpreter": dict.fromkeys(("narrow", "wide", "float"), Tile(16, 32, 1, 4, 1)),
}


@triton.jit(do_not_specialize=["chunks_ptr", "keys_ptr"])
def activation_gradient_kernel(
    grad_y_ptr,
    x_ptr,
    up_ptr,
    grad_x_ptr,
    grad_up_ptr,
    grad_shrunk_ptr,
    shrunk_ptr,
    partials_ptr,
    chunks_ptr,
    keys_ptr,
    threshold,
    column_a,
    column_b,
    scale,
    stride_chunk,
    stride_row,
    D: tl.constexpr,
    RANK_A: tl.constexpr,
    RANK_B: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KIND: tl.constexpr,
    HAS_A: tl.constexpr,
    HAS_B: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program for the rows of one chunk and one block of columns."""
    chunk = tl.program_id(0)
    start, end, _, group, group_start = load_chunk(chunks_ptr, chunk)
    feature = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    rank_a = tl.arange(0, BLOCK_A)
    rank_b = tl.arange(0, BLOCK_B)
    inside = (feature < D)[None, :]
    total_a = tl.zeros((BLOCK_D, BLOCK_A), tl.float32)
    total_b = tl.zeros((BLOCK_D, BLOCK_B), tl.float32)
    for first in range(start, end, BLOCK_M):
        row = first + tl.arange(0, BLOCK_M)
        mask = (row < end)[:, None] & inside
        row_offset = row.to(tl.int64)[:, None]
        wide = row_offset * stride_row + feature[None, :]
        grad = tl.load(grad_y_ptr + row_offset * D + feature[None, :], mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + wide, mask=mask, other=0.0).to(tl.float32)
        if KIND == "gelu":
            share = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
            y = x * share
            slope = share + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
        elif KIND == "gelu_tanh":
            share = sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
            y = x * share
            slope = share + y * (1.0 - share) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        else:
            share = sigmoid(x)
            up = tl.load(up_ptr + wide, mask=mask, other=0.0).to(tl.float32)
            tl.store(grad_up_ptr + wide, (grad * x * share).to(grad_up_ptr.dtype.element_ty), mask=mask)
            y = x * share * up
            slope = up * share * (1.0 + x * (1.0 - share))
        grad_x = (grad * slope).to(grad_x_ptr.dtype.element_ty)
        tl.store(grad_x_ptr + wide, grad_x, mask=mask)
        if HAS_A:
            y = y.to(x_ptr.dtype.element_ty)
            if DROPOUT:
                seeds = row_seeds(keys_ptr, group, row - group_start)
                y = tl.where(keep_entries(seeds, feature, threshold), y, 0.0)
            narrow_mask = (row < end)[:, None] & (rank_a < RANK_A)[None, :]
            narrow = tl.load(grad_shrunk_ptr + row_offset * RANK_A + rank_a[None, :], mask=narrow_mask, other=0.0)
            total_a = tl.dot(tl.trans(y), narrow, total_a, input_precision=PRECISION)
        if HAS_B:
            narrow_mask = (row < end)[:, None] & (rank_b < RANK_B)[None, :]
            narrow = tl.load(shrunk_ptr + row_offset * RANK_B + rank_b[None, :], mask=narrow_mask, other=0.0)
            total_b = tl.dot(tl.trans(grad_x), narrow, total_b, input_precision=PRECISION)
    if HAS_A or HAS_B:
        partials_ptr += chunk.to(tl.int64) * stride_chunk
    if HAS_A:
        partial_ptrs = partials_ptr + column_a + feature[:, None] + rank_a[None, :] * D
        tl.store(partial_ptrs, total_a, mask=(feature < D)[:, None] & (rank_a < RANK_A)[None, :])
    if HAS_B:
        partial_ptrs = partials_ptr + column_b + feature[:, None] * RANK_B + rank_b[None, :]
        tl.store(partial_ptrs, total_b * scale, mask=(feature < D)[:, None] & (rank_b < RANK_B)[None, :])


@register(SCHEMA, in_place)
def activation_gradient(
    kind: str,
    grad_y: Tensor,
    x: Tensor,
    up: Tensor | None,
    grad_x: Tensor,
    grad_up: Tensor | None,
    chunks: Tensor,
    partials: Tensor | None,
    grad_shrunk: Tensor | None,
    column_a: int,
    keys: Tensor | None,
    threshold: int,
    shrunk: Tensor | None,
    column_b: int,
    scale: float,
) -> None:
    """Write the gradients of x and, for `swiglu`, of up, and sums for dA and dB of the layers around into `partials`.

    Args:
        kind: `gelu`, `gelu_tanh` or `swiglu`.
        grad_y: [rows, D].
        x, up, grad_x, grad_up: [rows, D] of one row stride.
        chunks: `RowGroups.chunks(gradient_chunk(x)).rows`.
        partials: fp32 [chunks, columns of a slot].
        grad_shrunk: dS [rows, rank] of y's reader; the chunk's dA [rank, D] goes to `column_a`. None for none.
        keys, threshold: of the reader's dropout.
        shrunk: S [rows, rank] of the layer that made x; the chunk's dB [D, rank] goes to `column_b`. None for none.
        scale: of that layer's low-rank product.
    """
    ranks = [1 if narrow is None else narrow.shape[1] for narrow in (grad_shrunk, shrunk)]
    tile = choose(CONFIGS, x, max(ranks))
    launch(
        activation_gradient_kernel,
        (chunks.shape[0], triton.cdiv(x.shape[1], tile.columns)),
        *(grad_y, x, up, grad_x, grad_up, grad_shrunk, shrunk, partials, chunks, keys),
        *(threshold, column_a, column_b, scale),
        0 if partials is None else partials.stride(0),
        x.stride(0),
        D=x.shape[1],
        RANK_A=ranks[0],
        RANK_B=ranks[1],
        BLOCK_A=rank_block(ranks[0]),
        BLOCK_B=rank_block(ranks[1]),
        BLOCK_M=tile.rows,
        BLOCK_D=tile.columns,
        KIND=kind,
        HAS_A=grad_shrunk is not None,
        HAS_B=shrunk is not None,
        DROPOUT=keys is not None,
        PRECISION=dot_precision(x),
        **tile.options,
    )
