"""Frozen product with the grouped low-rank expand in the same kernel: y = x W^T + b + scale S B_k^T.

The rows are tiled densely, whatever group they belong to, so that small clients pay for no padding; a table
says which groups touch a tile, usually one or two. The input gradient dX = dY W + dS A_k is the same kernel
with W transposed.

Layers that read one input are one launch: the output's columns are divided into segments, each with a factor of its
own or none, and no tile straddles two. So is the gradient of that input: x comes in up to three pieces of columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import dot_precision, in_place, launch, register
from .configs import ConfigTable, Tile, any_rank, choose, rank_step
from .counter_hash import keep_entries, row_seeds
from .row_tables import load_filled, load_span
from .tile_loads import add_product, product_operands
from .tile_stores import finish_tile

_ARGUMENTS = (
    "Tensor[] x, Tensor weight, Tensor? bias, Tensor shrunk, Tensor?[] expand, int[] widths, Tensor spans, "
    "Tensor filled, float? scale, Tensor? keys, int threshold, bool transposed, "
    "Tensor? residual=None, Tensor? residual_index=None, Tensor? column_scale=None"
)
SCHEMA = f"lora_gemm({_ARGUMENTS}) -> Tensor"
ONTO_SCHEMA = f"lora_gemm_onto(Tensor(a!) out, Tensor? out_index, {_ARGUMENTS}) -> ()"
MOST_SEGMENTS = 3
"""Of the output's columns."""

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
def expand_operands(shrunk, own, ptr, columns, ranks, stride_n, stride_r, N, RANK: tl.constexpr):
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


@triton.jit
def column_tile(tile_n, N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, BLOCK_N: tl.constexpr):
    """(segment, its first column, the columns behind that, the tile's first one) when segments are tiled in turn."""
    if N1 == 0:
        return 0, 0, N0, tile_n * BLOCK_N
    else:
        tiles: tl.constexpr = (N0 + BLOCK_N - 1) // BLOCK_N
        both: tl.constexpr = tiles + (N1 + BLOCK_N - 1) // BLOCK_N
        segment = (tile_n >= tiles).to(tl.int32) + (tile_n >= both).to(tl.int32)
        start, width = of_segment(segment, 0, N0, N0 + N1), of_segment(segment, N0, N1, N2)
        return segment, start, width, (tile_n - of_segment(segment, 0, tiles, both)) * BLOCK_N


@triton.jit
def of_segment(segment, first, second, third):
    """The value of a segment."""
    return tl.where(segment == 0, first, tl.where(segment == 1, second, third))


@triton.jit(
    do_not_specialize=[
        "spans_ptr", "filled_ptr", "keys_ptr", "out_index_ptr", "residual_index_ptr",
        "rows", "row_tiles", "out_rows", "residual_rows",
    ]
)  # fmt: skip
def lora_gemm_kernel(
    x0,
    x1,
    x2,
    weight,
    bias_ptr,
    shrunk_ptr,
    expand0_ptr,
    expand1_ptr,
    expand2_ptr,
    y_ptr,
    spans_ptr,
    filled_ptr,
    keys_ptr,
    out_index_ptr,
    residual_ptr,
    residual_index_ptr,
    column_scale_ptr,
    rows,
    row_tiles,
    out_rows,
    residual_rows,
    stride_slot,
    stride_expand_n,
    stride_expand_r,
    scale,
    threshold,
    N0: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    K0: tl.constexpr,
    K1: tl.constexpr,
    K2: tl.constexpr,
    SHRUNK0: tl.constexpr,
    SHRUNK1: tl.constexpr,
    SHRUNK2: tl.constexpr,
    SHRUNK: tl.constexpr,
    RANK: tl.constexpr,
    RANK_STEP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    SCALED: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """One program makes one tile of y.

    SHRUNK is the number of columns of S, SHRUNK0 to SHRUNK2 the first one of each segment, -1 for none.
    """
    N: tl.constexpr = N0 + N1 + N2
    K: tl.constexpr = K0 + K1 + K2
    column_tiles = tl.cdiv(N0, BLOCK_N) + tl.cdiv(N1, BLOCK_N) + tl.cdiv(N2, BLOCK_N)
    tile_m, tile_n = swizzled_tile(tl.program_id(0), row_tiles, column_tiles, 8)
    segment, segment_start, width, first_column = column_tile(tile_n, N0, N1, N2, BLOCK_N)
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = first_column + tl.arange(0, BLOCK_N)
    row_offset = row.to(tl.int64)

    # The low-rank product comes first: scale and dropout act on it while it is alone in the accumulator.
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    seeds = tl.zeros((BLOCK_M,), tl.uint32)
    first, end = load_span(spans_ptr, tile_m)
    shrunk_column = of_segment(segment, SHRUNK0, SHRUNK1, SHRUNK2)
    end = tl.where(shrunk_column < 0, first, end)
    expand_ptr = of_segment(segment, expand0_ptr, expand1_ptr, expand2_ptr)
    for index in range(first, end):
        group_start, group_end, slot, group = load_filled(filled_ptr, index)
        own = (row >= group_start) & (row < group_end)
        factor_ptr = expand_ptr + slot * stride_slot
        for piece in range(0, RANK, RANK_STEP):
            rank = piece + tl.arange(0, RANK_STEP)
            shrunk = tl.load(
                shrunk_ptr + row_offset[:, None] * SHRUNK + shrunk_column + rank[None, :],
                mask=own[:, None] & (rank < RANK)[None, :],
                other=0.0,
            )
            shrunk, factor = expand_operands(
                shrunk, own, factor_ptr, column, rank, stride_expand_n, stride_expand_r, width, RANK
            )
            total = tl.dot(shrunk, factor, total, input_precision=PRECISION)
        if DROPOUT:
            seeds = tl.where(own, row_seeds(keys_ptr, group, row - group_start), seeds)
    if SCALED:
        total *= scale
    if DROPOUT:
        total = tl.where(keep_entries(seeds, column, threshold), total, 0.0)

    first_row, start = tile_m * BLOCK_M, segment_start + first_column
    total = add_product(
        total, x0, weight, first_row, start, rows,
        0, K0, N, K, TRANSPOSED, DESCRIPTORS, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if K1 > 0:
        total = add_product(
            total, x1, weight, first_row, start, rows,
            K0, K1, N, K, TRANSPOSED, DESCRIPTORS, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    if K2 > 0:
        total = add_product(
            total, x2, weight, first_row, start, rows,
            K0 + K1, K2, N, K, TRANSPOSED, DESCRIPTORS, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    finish_tile(
        total, row, segment_start + column, column < width, rows, y_ptr, out_index_ptr, out_rows,
        bias_ptr, column_scale_ptr, residual_ptr, residual_index_ptr, residual_rows, N,
    )  # fmt: skip


def _output(x: Sequence[Tensor], weight: Tensor, bias: Tensor | None, shrunk: Tensor, *rest: Any) -> Tensor:
    widths = rest[1]
    return shrunk.new_empty(shrunk.shape[0], sum(widths))


@register(SCHEMA, _output)
def lora_gemm(x: Sequence[Tensor], weight: Tensor, bias: Tensor | None, shrunk: Tensor, *rest: Any) -> Tensor:
    """x W^T + bias + scale S E_k^T for the rows of group k; `transposed`: x W + ... instead.

    Args:
        x: contiguous [rows, K_i], one to three, which side by side are x [rows, K]. K = 0 leaves the product out.
        weight: [N, K] (transposed: [K, N]), or the transpose of a contiguous matrix.
        bias: [N] or None.
        shrunk: contiguous [rows, rank times the number of factors].
        expand: the factor of each segment of the columns, with one stride between slots, lora_b [slots, width, rank]
            (transposed: lora_a [slots, rank, width]); None for a segment without one. The j-th factor meets the j-th
            `rank` columns of shrunk.
        widths: columns of each segment, one to three; together N.
        spans, filled: `RowGroups.spans(gemm_tile(shrunk, rank).rows)` and `RowGroups.filled`.
        scale: None where shrunk holds it.
        keys, threshold: dropout of the low-rank product, for one segment and x in one piece; keys None for none.
        transposed: see above.
        residual: contiguous [rows of the stream, N]: the result is residual[residual_index] + column_scale * the above.
        residual_index: int64 [rows]; None: row i for row i. A row that the residual lacks counts as zeros.
        column_scale: [N] (LayerScale).
    """
    y = _output(x, weight, bias, shrunk, *rest)
    _launch(y, None, x, weight, bias, shrunk, *rest)
    return y


@register(ONTO_SCHEMA, in_place)
def lora_gemm_onto(out: Tensor, out_index: Tensor | None, *arguments: Any) -> None:
    """`lora_gemm` of the further arguments, written into some rows of `out`.

    out: contiguous [rows of a stream, N]; may be the residual if both have one index.
    out_index: int64 [rows], distinct; None: row i for row i. A row outside `out` is left out.
    """
    _launch(out, out_index, *arguments)


def _launch(
    y: Tensor,
    y_index: Tensor | None,
    x: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    shrunk: Tensor,
    expand: Sequence[Tensor | None],
    widths: Sequence[int],
    spans: Tensor,
    filled: Tensor,
    scale: float | None,
    keys: Tensor | None,
    threshold: int,
    transposed: bool,
    residual: Tensor | None = None,
    residual_index: Tensor | None = None,
    column_scale: Tensor | None = None,
) -> None:
    factors = [factor for factor in expand if factor is not None]
    rank = shrunk.shape[1] // len(factors)
    tile = gemm_tile(shrunk, rank, keys is not None)
    operands = product_operands(tile, x, weight, transposed)
    slot_stride, *expand_strides = factors[0].stride()
    launch(
        lora_gemm_kernel,
        (spans.shape[0] * sum(triton.cdiv(width, tile.columns) for width in widths),),
        *operands.inputs,
        operands.weight,
        bias,
        shrunk,
        *_per_segment([factors[0] if factor is None else factor for factor in expand], factors[0]),
        y,
        spans,
        filled,
        keys,
        y_index,
        residual,
        residual_index,
        column_scale,
        shrunk.shape[0],
        spans.shape[0],
        y.shape[0],
        0 if residual is None else residual.shape[0],
        slot_stride,
        *(reversed(expand_strides) if transposed else expand_strides),
        scale,
        threshold,
        **_segment_options(expand, widths, rank),
        **{f"K{number}": depth for number, depth in enumerate(operands.depths)},
        SHRUNK=shrunk.shape[1],
        RANK=rank,
        RANK_STEP=rank_step(shrunk.dtype, rank),
        TRANSPOSED=operands.transposed,
        SCALED=scale is not None,
        DROPOUT=keys is not None,
        PRECISION=dot_precision(shrunk),
        DESCRIPTORS=operands.descriptors,
        **tile.product_options,
    )


def _segment_options(expand: Sequence[Tensor | None], widths: Sequence[int], rank: int) -> dict[str, int]:
    """Of each segment its width and its first column of S."""
    options, column = {}, 0
    for number, (factor, width) in enumerate(zip(expand, widths, strict=True)):
        options[f"N{number}"], options[f"SHRUNK{number}"] = width, -1 if factor is None else column
        column += 0 if factor is None else rank
    for number in range(len(widths), MOST_SEGMENTS):
        options[f"N{number}"], options[f"SHRUNK{number}"] = 0, -1
    return options


def _per_segment(values: Sequence[Tensor], missing: Tensor) -> Sequence[Tensor]:
    return [*values, *[missing] * (MOST_SEGMENTS - len(values))]
