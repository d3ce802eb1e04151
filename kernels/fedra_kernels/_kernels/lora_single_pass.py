"""Frozen product, shrink and expand in one pass over x, for inputs whose S no producer has made.

x W^T and x A_k^T share the loop over K: x is read once, at the price of repeating the small shrink in every
column tile. A tile that several groups touch repeats the shrink alone for each further group.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import launch, register
from .configs import ConfigTable, Tile, choose, low_rank_options
from .lora_gemm import expand_operands, swizzled_tile
from .row_tables import load_filled, load_span
from .tile_loads import product_operands, row_block, weight_block
from .tile_stores import finish_tile

_ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, Tensor spans, Tensor filled, float scale, "
    "Tensor? residual=None, Tensor? residual_index=None, Tensor? column_scale=None"
)
SCHEMA = f"lora_single_pass({_ARGUMENTS}) -> (Tensor, Tensor)"
ONTO_SCHEMA = f"lora_single_pass_onto(Tensor(a!) out, Tensor? out_index, {_ARGUMENTS}) -> Tensor"

CONFIGS: ConfigTable = {
    "sm_80": {"narrow": Tile(128, 128, 64, 8, 4), "float": Tile(64, 32, 16, 4, 3)},
    "sm_90": {"narrow": Tile(128, 256, 64, 8, 3, True), "float": Tile(64, 32, 16, 4, 3)},
    "sm_100": {"narrow": Tile(128, 256, 64, 8, 3, True), "float": Tile(64, 32, 16, 4, 3)},
    "gfx942": {"narrow": Tile(128, 128, 32, 8, 2), "float": Tile(64, 64, 16, 8, 2)},
    "small": {"narrow": Tile(64, 128, 64, 4, 3), "float": Tile(64, 64, 16, 8, 2)},
    "interpreter": {"narrow": Tile(32, 32, 32, 4, 1, True), "float": Tile(32, 32, 32, 4, 1)},
}


def single_pass_tile(x: Tensor, rank: int) -> Tile:
    """The tile of `lora_single_pass`."""
    return choose(CONFIGS, x, rank)


@triton.jit
def shrink_block(lora_a_ptr, k, K: tl.constexpr, RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """[BLOCK_K, RANK_BLOCK] of a slot's A^T; zeros outside."""
    depth = (k + tl.arange(0, BLOCK_K))[:, None]
    rank = tl.arange(0, RANK_BLOCK)[None, :]
    return tl.load(lora_a_ptr + rank * K + depth, mask=(rank < RANK) & (depth < K), other=0.0)


@triton.jit(
    do_not_specialize=[
        "spans_ptr", "filled_ptr", "out_index_ptr", "residual_index_ptr",
        "rows", "row_tiles", "out_rows", "residual_rows",
    ]
)  # fmt: skip
def lora_single_pass_kernel(
    x,
    weight,
    bias_ptr,
    lora_a_ptr,
    lora_b_ptr,
    y_ptr,
    shrunk_ptr,
    spans_ptr,
    filled_ptr,
    out_index_ptr,
    residual_ptr,
    residual_index_ptr,
    column_scale_ptr,
    rows,
    row_tiles,
    out_rows,
    residual_rows,
    stride_slot_a,
    stride_slot_b,
    scale,
    N: tl.constexpr,
    K: tl.constexpr,
    RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """One program makes one tile of y; those of the first columns also store S."""
    tile_m, tile_n = swizzled_tile(tl.program_id(0), row_tiles, tl.cdiv(N, BLOCK_N), 8)
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rank = tl.arange(0, RANK_BLOCK)
    rank_mask = rank < RANK

    first, end = load_span(spans_ptr, tile_m)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    shrunk = tl.zeros((BLOCK_M, RANK_BLOCK), tl.float32)
    _, _, first_slot, _ = load_filled(filled_ptr, first)
    factor_ptr = lora_a_ptr + first_slot * stride_slot_a
    for k in range(0, K, BLOCK_K):
        left = row_block(x, tile_m * BLOCK_M, rows, k, K, BLOCK_M, BLOCK_K, DESCRIPTORS)
        right = weight_block(
            weight, tile_n * BLOCK_N, k, K, N, K, K % BLOCK_K != 0, TRANSPOSED, BLOCK_N, BLOCK_K, DESCRIPTORS
        )
        factor = shrink_block(factor_ptr, k, K, RANK, RANK_BLOCK, BLOCK_K)
        total = tl.dot(left, right, total, input_precision=PRECISION)
        shrunk = tl.dot(left, factor, shrunk, input_precision=PRECISION)

    for index in range(first, end):
        group_start, group_end, slot, _ = load_filled(filled_ptr, index)
        if index > first:
            shrunk = tl.zeros((BLOCK_M, RANK_BLOCK), tl.float32)
            factor_ptr = lora_a_ptr + slot * stride_slot_a
            for k in range(0, K, BLOCK_K):
                left = row_block(x, tile_m * BLOCK_M, rows, k, K, BLOCK_M, BLOCK_K, DESCRIPTORS)
                factor = shrink_block(factor_ptr, k, K, RANK, RANK_BLOCK, BLOCK_K)
                shrunk = tl.dot(left, factor, shrunk, input_precision=PRECISION)
        own = (row >= group_start) & (row < group_end)
        mine = tl.where(own[:, None], shrunk, 0.0)
        if tile_n == 0:
            shrunk_ptrs = shrunk_ptr + row.to(tl.int64)[:, None] * RANK + rank[None, :]
            shrunk_mask = own[:, None] & rank_mask[None, :]
            tl.store(shrunk_ptrs, mine.to(shrunk_ptr.dtype.element_ty), mask=shrunk_mask)
        mine, factor = expand_operands(
            mine * scale, own, lora_b_ptr + slot * stride_slot_b, column, rank, RANK, 1, N, RANK
        )
        total = tl.dot(mine, factor, total, input_precision=PRECISION)

    finish_tile(
        total, row, column, column < N, rows, y_ptr, out_index_ptr, out_rows,
        bias_ptr, column_scale_ptr, residual_ptr, residual_index_ptr, residual_rows, N,
    )  # fmt: skip


def _outputs(x: Tensor, weight: Tensor, lora_a: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], lora_a.shape[1])


@register(SCHEMA, lambda x, weight, bias, lora_a, *_: _outputs(x, weight, lora_a))
def lora_single_pass(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    """(x W^T + bias + scale (x A_k^T) B_k^T, x A_k^T) for the rows of group k; ranks up to NARROW_RANK.

    Args:
        x: [rows, K].
        weight: [N, K], or the transpose of a contiguous matrix.
        bias: [N] or None.
        lora_a: [slots, rank, K].
        lora_b: [slots, N, rank].
        spans, filled: `RowGroups.spans(single_pass_tile(x, rank).rows)` and `RowGroups.filled`.
        scale: of the low-rank product.
        residual, residual_index, column_scale: as for `lora_gemm`.
    """
    y, shrunk = _outputs(x, weight, lora_a)
    _launch(y, None, shrunk, x, weight, bias, lora_a, *rest)
    return y, shrunk


@register(ONTO_SCHEMA, lambda out, index, x, weight, bias, lora_a, *_: x.new_empty(x.shape[0], lora_a.shape[1]))
def lora_single_pass_onto(
    out: Tensor, out_index: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, *rest: Any
) -> Tensor:
    """x A_k^T; what else `lora_single_pass` makes of the further arguments goes to some rows of `out`.

    out, out_index: as for `lora_gemm_onto`.
    """
    shrunk = x.new_empty(x.shape[0], lora_a.shape[1])
    _launch(out, out_index, shrunk, x, weight, bias, lora_a, *rest)
    return shrunk


def _launch(
    y: Tensor,
    y_index: Tensor | None,
    shrunk: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    spans: Tensor,
    filled: Tensor,
    scale: float,
    residual: Tensor | None = None,
    residual_index: Tensor | None = None,
    column_scale: Tensor | None = None,
) -> None:
    rank = lora_a.shape[1]
    tile = single_pass_tile(x, rank)
    operands = product_operands(tile, [x], weight, False)
    launch(
        lora_single_pass_kernel,
        (spans.shape[0] * triton.cdiv(y.shape[1], tile.columns),),
        operands.inputs[0],
        operands.weight,
        bias,
        lora_a,
        lora_b,
        y,
        shrunk,
        spans,
        filled,
        y_index,
        residual,
        residual_index,
        column_scale,
        x.shape[0],
        spans.shape[0],
        y.shape[0],
        0 if residual is None else residual.shape[0],
        lora_a.stride(0),
        lora_b.stride(0),
        scale,
        N=y.shape[1],
        K=x.shape[1],
        TRANSPOSED=operands.transposed,
        DESCRIPTORS=operands.descriptors,
        **low_rank_options(x, rank),
        **tile.product_options,
    )
