"""Frozen product with the grouped low-rank expand in the same kernel: y = x W^T + b + scale S B_k^T.

The rows are tiled densely, whatever group they belong to, so that small clients pay for no padding; a table
says which groups touch a tile, usually one or two. The input gradient dX = dY W + dS A_k is the same kernel
with W transposed.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import launch, register
from .configs import ConfigTable, Tile, any_rank, choose, low_rank_options, rank_step
from .counter_hash import keep_entries, row_seeds
from .row_tables import load_filled, load_span
from .tile_loads import product_operands, row_block, weight_block

SCHEMA = (
    "lora_gemm(Tensor x, Tensor weight, Tensor? bias, Tensor shrunk, Tensor expand, Tensor spans, "
    "Tensor filled, float? scale, Tensor? keys, int threshold, bool transposed) -> Tensor"
)

CONFIGS: ConfigTable = {
    "sm_80": any_rank(Tile(128, 128, 64, 8, 4), Tile(64, 64, 16, 8, 3)),
    "sm_90": any_rank(Tile(128, 256, 64, 8, 3, True), Tile(64, 64, 16, 8, 3)),
    "sm_100": any_rank(Tile(128, 256, 64, 8, 3, True), Tile(64, 64, 16, 8, 3)),
    "gfx942": any_rank(Tile(128, 128, 32, 8, 2), Tile(64, 64, 16, 8, 2)),
    "small": any_rank(Tile(64, 128, 64, 4, 3), Tile(64, 64, 16, 8, 2)),
    "interpreter": any_rank(Tile(32, 32, 32, 4, 1, True), Tile(32, 32, 32, 4, 1)),
}

# The mask of the input gradient lives beside the accumulator.
DROPOUT_CONFIGS: ConfigTable = {
    "sm_80": any_rank(Tile(128, 64, 64, 8, 4), Tile(64, 64, 16, 8, 3)),
    "sm_90": any_rank(Tile(128, 128, 64, 8, 4, True), Tile(64, 64, 16, 8, 2)),
    "sm_100": any_rank(Tile(128, 128, 64, 8, 4, True), Tile(64, 64, 16, 8, 3)),
    "gfx942": any_rank(Tile(128, 64, 32, 8, 2), Tile(64, 64, 16, 8, 2)),
    "small": any_rank(Tile(64, 64, 64, 4, 3), Tile(64, 64, 16, 8, 2)),
    "interpreter": any_rank(Tile(32, 32, 32, 4, 1, True), Tile(32, 32, 32, 4, 1)),
}


def gemm_tile(x: Tensor, rank: int, dropout: bool = False) -> Tile:
    """The tile of `lora_gemm`."""
    return choose(DROPOUT_CONFIGS if dropout else CONFIGS, x, rank)


@triton.jit
def swizzled_tile(program, row_tiles, column_tiles, GROUP: tl.constexpr):
    """(row tile, column tile) of a program: GROUP row tiles share their weight columns in the L2 cache."""
    width = GROUP * column_tiles
    first = program // width * GROUP
    size = min(row_tiles - first, GROUP)
    return first + program % width % size, program % width // size


@triton.jit
def expand_operands(shrunk, own, ptr, columns, ranks, stride_n, stride_r, N: tl.constexpr, RANK: tl.constexpr):
    """The group's own rows of S and its factor as [ranks, columns]; zeros in the rows of other groups.

    Those rows meet the factor as zeros times its entries: with an infinite entry of a client that diverged,
    they would turn to NaN. So the factor goes without its non-finite entries, and the client's own rows are
    made NaN.
    """
    mask = (ranks < RANK)[:, None] & (columns < N)[None, :]
    offsets = columns.to(tl.int64)[None, :] * stride_n + ranks[:, None] * stride_r
    factor = tl.load(ptr + offsets, mask=mask, other=0.0)
    wide = factor.to(tl.float32)
    finite = tl.abs(wide) < float("inf")
    broken = tl.max(tl.max(tl.where(finite, 0, 1), axis=1), axis=0) > 0
    shrunk = tl.where(own[:, None], tl.where(broken, float("nan"), shrunk.to(tl.float32)), 0.0)
    return shrunk.to(factor.dtype), tl.where(finite, wide, 0.0).to(factor.dtype)


@triton.jit(do_not_specialize=["spans_ptr", "filled_ptr", "keys_ptr", "rows", "row_tiles"])
def lora_gemm_kernel(
    x,
    weight,
    bias_ptr,
    shrunk_ptr,
    expand_ptr,
    y_ptr,
    spans_ptr,
    filled_ptr,
    keys_ptr,
    rows,
    row_tiles,
    stride_slot,
    stride_expand_n,
    stride_expand_r,
    scale,
    threshold,
    N: tl.constexpr,
    K: tl.constexpr,
    RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    RANK_STEP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SCALED: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """One program makes one tile of y."""
    tile_m, tile_n = swizzled_tile(tl.program_id(0), row_tiles, tl.cdiv(N, BLOCK_N), 8)
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = row < rows
    column_mask = column < N
    row_offset = row.to(tl.int64)

    # The low-rank product comes first: scale and dropout act on it while it is alone in the accumulator.
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    seeds = tl.zeros((BLOCK_M,), tl.uint32)
    first, end = load_span(spans_ptr, tile_m)
    for index in range(first, end):
        group_start, group_end, slot, group = load_filled(filled_ptr, index)
        own = (row >= group_start) & (row < group_end)
        factor_ptr = expand_ptr + slot * stride_slot
        for piece in range(0, RANK_BLOCK, RANK_STEP):
            rank = piece + tl.arange(0, RANK_STEP)
            shrunk = tl.load(
                shrunk_ptr + row_offset[:, None] * RANK + rank[None, :],
                mask=own[:, None] & (rank < RANK)[None, :],
                other=0.0,
            )
            shrunk, factor = expand_operands(
                shrunk, own, factor_ptr, column, rank, stride_expand_n, stride_expand_r, N, RANK
            )
            total = tl.dot(shrunk, factor, total, input_precision=PRECISION)
        if DROPOUT:
            seeds = tl.where(own, row_seeds(keys_ptr, group, row - group_start), seeds)
    if SCALED:
        total *= scale
    if DROPOUT:
        total = tl.where(keep_entries(seeds, column, threshold), total, 0.0)

    for k in range(0, K, BLOCK_K):
        left = row_block(x, tile_m * BLOCK_M, rows, k, K, BLOCK_M, BLOCK_K, DESCRIPTORS)
        right = weight_block(weight, tile_n * BLOCK_N, k, N, K, TRANSPOSED, BLOCK_N, BLOCK_K, DESCRIPTORS)
        total = tl.dot(left, right, total, input_precision=PRECISION)

    if HAS_BIAS:
        total += tl.load(bias_ptr + column, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + row_offset[:, None] * N + column[None, :]
    tl.store(y_ptrs, total.to(y_ptr.dtype.element_ty), mask=row_mask[:, None] & column_mask[None, :])


def _output(x: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1 if transposed else 0])


@register(SCHEMA, lambda x, weight, *rest: _output(x, weight, rest[-1]))
def lora_gemm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shrunk: Tensor,
    expand: Tensor,
    spans: Tensor,
    filled: Tensor,
    scale: float | None,
    keys: Tensor | None,
    threshold: int,
    transposed: bool,
) -> Tensor:
    """x W^T + bias + scale S E_k^T for the rows of group k; `transposed`: x W + ... instead.

    x [rows, K], weight [N, K] (transposed: [K, N]), bias [N] or None, shrunk [rows, rank];
    expand: lora_b [slots, N, rank] (transposed: lora_a [slots, rank, N]);
    spans, filled: `RowGroups.spans(gemm_tile(x, rank).rows)` and `RowGroups.filled`;
    scale: None where shrunk holds it; keys, threshold: dropout of the low-rank product.
    """
    rank = shrunk.shape[1]
    tile = gemm_tile(x, rank, keys is not None)
    y = _output(x, weight, transposed)
    left, right, flipped, descriptors = product_operands(tile, x, weight, transposed)
    slot_stride, *expand_strides = expand.stride()
    launch(
        lora_gemm_kernel,
        (spans.shape[0] * triton.cdiv(y.shape[1], tile.columns),),
        left,
        right,
        bias,
        shrunk,
        expand,
        y,
        spans,
        filled,
        keys,
        x.shape[0],
        spans.shape[0],
        slot_stride,
        *(reversed(expand_strides) if transposed else expand_strides),
        scale,
        threshold,
        N=y.shape[1],
        K=x.shape[1],
        RANK_STEP=rank_step(x.dtype, rank),
        TRANSPOSED=flipped,
        HAS_BIAS=bias is not None,
        SCALED=scale is not None,
        DROPOUT=keys is not None,
        DESCRIPTORS=descriptors,
        **low_rank_options(x, rank),
        **tile.product_options,
    )
    return y
