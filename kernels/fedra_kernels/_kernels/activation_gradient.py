"""Backward of an activation, which also sums up dA of the layer that has read the activation's output.

That output, y, is computed anew, so that it need not be kept.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import in_place, launch, register
from .activation import sigmoid
from .configs import ConfigTable, Tile, choose, low_rank_options
from .counter_hash import keep_entries, row_seeds
from .row_tables import load_chunk

SCHEMA = (
    "activation_gradient(str kind, Tensor grad_y, Tensor x, Tensor? up, Tensor(a!) grad_x, Tensor(b!)? grad_up, "
    "Tensor chunks, Tensor? grad_shrunk, Tensor(c!)? partials, int column, Tensor? keys, int threshold) -> ()"
)

CONFIGS: ConfigTable = {
    "sm_80": {"narrow": Tile(64, 64, 1, 8, 2), "wide": Tile(64, 64, 1, 8, 2), "float": Tile(32, 32, 1, 4, 2)},
    "sm_90": {"narrow": Tile(64, 128, 1, 8, 3), "wide": Tile(64, 64, 1, 8, 3), "float": Tile(32, 32, 1, 4, 2)},
    "sm_100": {"narrow": Tile(64, 128, 1, 8, 3), "wide": Tile(64, 64, 1, 8, 3), "float": Tile(32, 32, 1, 4, 2)},
    "gfx942": {"narrow": Tile(64, 64, 1, 8, 2), "wide": Tile(32, 64, 1, 4, 2), "float": Tile(32, 32, 1, 4, 2)},
    "small": {"narrow": Tile(64, 64, 1, 8, 2), "wide": Tile(64, 64, 1, 8, 2), "float": Tile(32, 32, 1, 4, 2)},
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
    partials_ptr,
    chunks_ptr,
    keys_ptr,
    threshold,
    column,
    stride_chunk,
    stride_row,
    D: tl.constexpr,
    RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KIND: tl.constexpr,
    TRAINED: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program for the rows of one chunk and one block of columns."""
    chunk = tl.program_id(0)
    start, end, _, group, group_start = load_chunk(chunks_ptr, chunk)
    feature = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    rank = tl.arange(0, RANK_BLOCK)
    inside = (feature < D)[None, :]
    total = tl.zeros((BLOCK_D, RANK_BLOCK), tl.float32)
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
        tl.store(grad_x_ptr + wide, (grad * slope).to(grad_x_ptr.dtype.element_ty), mask=mask)
        if TRAINED:
            y = y.to(x_ptr.dtype.element_ty)
            if DROPOUT:
                seeds = row_seeds(keys_ptr, group, row - group_start)
                y = tl.where(keep_entries(seeds, feature, threshold), y, 0.0)
            narrow_mask = (row < end)[:, None] & (rank < RANK)[None, :]
            narrow = tl.load(grad_shrunk_ptr + row_offset * RANK + rank[None, :], mask=narrow_mask, other=0.0)
            total = tl.dot(tl.trans(y), narrow, total, input_precision=PRECISION)
    if TRAINED:
        partial_ptrs = partials_ptr + chunk.to(tl.int64) * stride_chunk + column
        partial_ptrs += feature[:, None] + rank[None, :] * D
        tl.store(partial_ptrs, total, mask=(feature < D)[:, None] & (rank < RANK)[None, :])


@register(SCHEMA, in_place)
def activation_gradient(
    kind: str,
    grad_y: Tensor,
    x: Tensor,
    up: Tensor | None,
    grad_x: Tensor,
    grad_up: Tensor | None,
    chunks: Tensor,
    grad_shrunk: Tensor | None,
    partials: Tensor | None,
    column: int,
    keys: Tensor | None,
    threshold: int,
) -> None:
    """Write the gradients of x and, for `swiglu`, of up; with `grad_shrunk` also dA of y's reader into `partials`.

    Args:
        kind: `gelu`, `gelu_tanh` or `swiglu`.
        grad_y: [rows, D].
        x, up, grad_x, grad_up: [rows, D] of one row stride.
        chunks: `RowGroups.chunks(gradient_chunk(x)).rows`.
        grad_shrunk: dS [rows, rank] of y's reader.
        partials: fp32 [chunks, columns of a slot]; the chunk's dA [rank, D] goes to `column`.
        keys, threshold: of the reader's dropout.
    """
    rank = 1 if grad_shrunk is None else grad_shrunk.shape[1]
    tile = choose(CONFIGS, x, rank)
    launch(
        activation_gradient_kernel,
        (chunks.shape[0], triton.cdiv(x.shape[1], tile.columns)),
        grad_y,
        x,
        up,
        grad_x,
        grad_up,
        grad_shrunk,
        partials,
        chunks,
        keys,
        threshold,
        column,
        0 if partials is None else partials.stride(0),
        x.stride(0),
        D=x.shape[1],
        BLOCK_M=tile.rows,
        BLOCK_D=tile.columns,
        KIND=kind,
        TRAINED=partials is not None,
        DROPOUT=keys is not None,
        **low_rank_options(x, rank),
        **tile.options,
    )
