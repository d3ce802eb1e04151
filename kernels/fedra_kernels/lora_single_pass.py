"""Frozen product, shrink and expand in one pass over x, for inputs whose S no producer has made.

x W^T and x A_k^T share the loop over K: x is read once, at the price of repeating the small shrink in every
column tile. A tile that several groups touch repeats the shrink alone for each further group.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .configs import ConfigTable, Tile, choose, rank_block
from .dispatch import dot_precision, launch, register
from .lora_gemm import expand_operand, swizzled_tile

SCHEMA = (
    "lora_single_pass(Tensor x, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, Tensor spans, "
    "Tensor groups, Tensor scales) -> (Tensor, Tensor)"
)

CONFIGS: ConfigTable = {
    "sm_80": {"narrow": Tile(128, 128, 64, 8, 4), "float": Tile(64, 64, 32, 4, 3)},
    "sm_90": {"narrow": Tile(128, 256, 64, 8, 3), "float": Tile(64, 64, 32, 4, 3)},
    "sm_100": {"narrow": Tile(128, 256, 64, 8, 3), "float": Tile(64, 64, 32, 4, 3)},
    "gfx942": {"narrow": Tile(128, 128, 32, 8, 2), "float": Tile(64, 64, 32, 4, 2)},
    "small": {"narrow": Tile(64, 128, 64, 4, 3), "float": Tile(64, 64, 32, 4, 2)},
    "interpreter": dict.fromkeys(("narrow", "float"), Tile(32, 32, 32, 4, 1)),
}


def single_pass_tile(x: Tensor, rank: int) -> Tile:
    return choose(CONFIGS, x, rank)


@triton.jit
def lora_single_pass_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    lora_a_ptr,
    lora_b_ptr,
    y_ptr,
    shrunk_ptr,
    spans_ptr,
    groups_ptr,
    scales_ptr,
    rows,
    row_tiles,
    stride_slot_a,
    stride_slot_b,
    N: tl.constexpr,
    K: tl.constexpr,
    RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile_m, tile_n = swizzled_tile(tl.program_id(0), row_tiles, tl.cdiv(N, BLOCK_N), 8)
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    rank = tl.arange(0, RANK_BLOCK)
    row_mask = row < rows
    column_mask = column < N
    rank_mask = rank < RANK
    x_base = x_ptr + row.to(tl.int64)[:, None] * K + depth[None, :]
    a_offset = rank[None, :] * K + depth[:, None]

    first = tl.load(spans_ptr + 2 * tile_m)
    end = tl.load(spans_ptr + 2 * tile_m + 1)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    shrunk = tl.zeros((BLOCK_M, RANK_BLOCK), tl.float32)
    x_ptrs = x_base
    weight_ptrs = weight_ptr + column.to(tl.int64)[None, :] * K + depth[:, None]
    a_ptrs = lora_a_ptr + tl.load(groups_ptr + 4 * first + 2).to(tl.int64) * stride_slot_a + a_offset
    for k in range(0, K, BLOCK_K):
        x_mask = row_mask[:, None]
        weight_mask = column_mask[None, :]
        a_mask = rank_mask[None, :]
        if K % BLOCK_K != 0:
            x_mask &= (k + depth < K)[None, :]
            weight_mask &= (k + depth < K)[:, None]
            a_mask &= (k + depth < K)[:, None]
        x = tl.load(x_ptrs, mask=x_mask, other=0.0)
        weight = tl.load(weight_ptrs, mask=weight_mask, other=0.0)
        factor = tl.load(a_ptrs, mask=a_mask, other=0.0)
        total = tl.dot(x, weight, total, input_precision=PRECISION)
        shrunk = tl.dot(x, factor, shrunk, input_precision=PRECISION)
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K
        a_ptrs += BLOCK_K

    for index in range(first, end):
        group_start = tl.load(groups_ptr + 4 * index)
        group_end = tl.load(groups_ptr + 4 * index + 1)
        slot = tl.load(groups_ptr + 4 * index + 2).to(tl.int64)
        scale = tl.load(scales_ptr + tl.load(groups_ptr + 4 * index + 3))
        if index > first:
            shrunk = tl.zeros((BLOCK_M, RANK_BLOCK), tl.float32)
            x_ptrs = x_base
            a_ptrs = lora_a_ptr + slot * stride_slot_a + a_offset
            for k in range(0, K, BLOCK_K):
                inside = k + depth < K
                x = tl.load(x_ptrs, mask=row_mask[:, None] & inside[None, :], other=0.0)
                factor = tl.load(a_ptrs, mask=rank_mask[None, :] & inside[:, None], other=0.0)
                shrunk = tl.dot(x, factor, shrunk, input_precision=PRECISION)
                x_ptrs += BLOCK_K
                a_ptrs += BLOCK_K
        own = (row >= group_start) & (row < group_end)
        mine = tl.where(own[:, None], shrunk, 0.0)
        if tile_n == 0:
            shrunk_ptrs = shrunk_ptr + row.to(tl.int64)[:, None] * RANK + rank[None, :]
            shrunk_mask = own[:, None] & rank_mask[None, :]
            tl.store(shrunk_ptrs, mine.to(shrunk_ptr.dtype.element_ty), mask=shrunk_mask)
        factor, broken = expand_operand(lora_b_ptr + slot * stride_slot_b, column, rank, RANK, 1, N, RANK)
        total = tl.dot((mine * scale).to(factor.dtype), factor, total, input_precision=PRECISION)
        total = tl.where(own[:, None] & broken[None, :], float("nan"), total)

    if HAS_BIAS:
        total += tl.load(bias_ptr + column, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + row.to(tl.int64)[:, None] * N + column[None, :]
    tl.store(y_ptrs, total.to(y_ptr.dtype.element_ty), mask=row_mask[:, None] & column_mask[None, :])


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    spans: Tensor,
    groups: Tensor,
    scales: Tensor,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], lora_a.shape[1])


@register(SCHEMA, _fake)
def lora_single_pass(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    spans: Tensor,
    groups: Tensor,
    scales: Tensor,
) -> tuple[Tensor, Tensor]:
    """(x W^T + bias + scale_k (x A_k^T) B_k^T, x A_k^T) for the rows of group k; ranks up to NARROW_RANK.

    x [rows, K], weight [N, K], lora_a [slots, rank, K], lora_b [slots, N, rank];
    spans, groups: `RowGroups.spans(single_pass_tile(x, rank).rows)` and `RowGroups.filled`; scales fp32 [groups].
    """
    rank = lora_a.shape[1]
    tile = single_pass_tile(x, rank)
    columns, depth = weight.shape
    y = x.new_empty(x.shape[0], columns)
    shrunk = x.new_empty(x.shape[0], rank)
    launch(
        lora_single_pass_kernel,
        (spans.shape[0] * triton.cdiv(columns, tile.columns),),
        x,
        weight,
        bias,
        lora_a,
        lora_b,
        y,
        shrunk,
        spans,
        groups,
        scales,
        x.shape[0],
        spans.shape[0],
        lora_a.stride(0),
        lora_b.stride(0),
        N=columns,
        K=depth,
        RANK=rank,
        RANK_BLOCK=rank_block(rank),
        BLOCK_M=tile.rows,
        BLOCK_N=tile.columns,
        BLOCK_K=tile.depth,
        HAS_BIAS=bias is not None,
        PRECISION=dot_precision(x),
        **tile.options,
    )
    return y, shrunk
