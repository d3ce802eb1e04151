"""Frozen product with the grouped low-rank expand in the same kernel: y = x W^T + b + scale S B_k^T.

The rows are tiled densely, whatever group they belong to, so that small clients pay for no padding; a table
says which groups touch a tile, usually one or two. The input gradient dX = dY W + dS A_k is the same kernel
with W transposed.

Layers that read one input are one launch: the output's columns are divided into segments, each with a factor of its
own or none, and no tile straddles two. So is the gradient of that input: x comes in up to three pieces of columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import dot_precision, in_place, launch, register
from .configs import MOST_LINEARS, Tile, rank_step
from .low_rank_tiles import add_low_rank, drop_entries
from .product_forms import DROPOUT_FORMS, GEMM_FORMS, Form, choose_form, form_tile, padded_columns, programs
from .row_tables import load_filled, load_span
from .tile_loads import add_product, product_operands
from .tile_stores import halves, output_descriptor, store_tile

_ARGUMENTS = (
    "Tensor[] x, Tensor weight, Tensor? bias, Tensor shrunk, Tensor?[] expand, int[] widths, Tensor spans, "
    "Tensor filled, float? scale, Tensor? keys=None, int threshold=0, bool transposed=False, "
    "Tensor? residual=None, Tensor? residual_index=None, Tensor? column_scale=None"
)
SCHEMA = f"lora_gemm({_ARGUMENTS}) -> Tensor"
ONTO_SCHEMA = f"lora_gemm_onto(Tensor(a!) out, Tensor? out_index, {_ARGUMENTS}) -> ()"


def gemm_tile(x: Tensor, rank: int) -> Tile:
    """A tile with the rows that every form of `lora_gemm` has for this dtype and rank."""
    return form_tile(GEMM_FORMS, x, rank)


@triton.jit
def swizzled_tile(program, row_tiles, column_tiles, GROUP: tl.constexpr):
    """(row tile, column tile) of a program: GROUP row tiles share their weight columns in the L2 cache."""
    width = GROUP * column_tiles
    first = program // width * GROUP
    size = min(row_tiles - first, GROUP)
    return first + program % width % size, program % width // size


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


@triton.jit
def product_tile(
    tile, x0, x1, x2, weight, tables, bank, ending, row_tiles, keys_ptr, threshold,
    N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr,
    SHRUNK0: tl.constexpr, SHRUNK1: tl.constexpr, SHRUNK2: tl.constexpr, SHRUNK: tl.constexpr,
    RANK: tl.constexpr, RANK_STEP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
    TRANSPOSED: tl.constexpr, SCALED: tl.constexpr, SPLIT: tl.constexpr, DROPOUT: tl.constexpr, SEPARATE: tl.constexpr,
    PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr, OUT_DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """One tile of y; see `lora_gemm_kernel`."""
    tile_m, tile_n = swizzled_tile(
        tile, row_tiles, tl.cdiv(N0, BLOCK_N) + tl.cdiv(N1, BLOCK_N) + tl.cdiv(N2, BLOCK_N), 8
    )
    segment, segment_start, width, first_column = column_tile(tile_n, N0, N1, N2, BLOCK_N)
    first_row, start = tile_m * BLOCK_M, segment_start + first_column
    # The tables are read here, so that the low-rank product waits for nothing but its operands.
    spans_ptr, filled_ptr = tables
    first, end = load_span(spans_ptr, tile_m)
    group_start, group_end, slot, _ = load_filled(filled_ptr, first)

    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    total = add_product(
        total, x0, x1, x2, weight, first_row, start, ending[0],
        K0, K1, K2, N0 + N1 + N2, TRANSPOSED, DESCRIPTORS, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip

    shrunk_ptr, expand0_ptr, expand1_ptr, expand2_ptr, stride_slot, stride_n, stride_r, scale = bank
    shrunk_column = of_segment(segment, SHRUNK0, SHRUNK1, SHRUNK2)
    expand_ptr = of_segment(segment, expand0_ptr, expand1_ptr, expand2_ptr)
    adapted = shrunk_column >= 0
    # A segment without a factor has the pointer of another's, from which nothing is read.
    columns = tl.where(adapted, width, 0)
    adapter = (shrunk_ptr, shrunk_column, adapted, expand_ptr, columns, stride_slot, stride_n, stride_r, scale)
    groups, first_group = (filled_ptr, first, tl.where(adapted, end, first)), (group_start, group_end, slot)
    end_tile(
        total, adapter, groups, first_group, ending, keys_ptr, threshold, first_row, first_column, segment_start, width,
        N0 + N1 + N2, SHRUNK, RANK, RANK_STEP, BLOCK_M, BLOCK_N, PARTS,
        SCALED, SPLIT, DROPOUT, SEPARATE, PRECISION, OUT_DESCRIPTOR,
    )  # fmt: skip


@triton.jit
def end_tile(
    total, adapter, groups, first_group, ending, keys_ptr, threshold, first_row, first_column, segment_start, width,
    N: tl.constexpr, SHRUNK: tl.constexpr, RANK: tl.constexpr, RANK_STEP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr,
    SCALED: tl.constexpr, SPLIT: tl.constexpr, DROPOUT: tl.constexpr, SEPARATE: tl.constexpr,
    PRECISION: tl.constexpr, OUT_DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """Add the low-rank product to the frozen one and store the tile."""
    if SEPARATE and PARTS > 1:
        left, right = halves(total, BLOCK_M, BLOCK_N)
        end_tile(
            left, adapter, groups, first_group, ending, keys_ptr, threshold,
            first_row, first_column, segment_start, width, N, SHRUNK, RANK, RANK_STEP,
            BLOCK_M, BLOCK_N // 2, PARTS // 2, SCALED, SPLIT, DROPOUT, SEPARATE, PRECISION, OUT_DESCRIPTOR,
        )  # fmt: skip
        end_tile(
            right, adapter, groups, first_group, ending, keys_ptr, threshold,
            first_row, first_column + BLOCK_N // 2, segment_start, width, N, SHRUNK, RANK, RANK_STEP,
            BLOCK_M, BLOCK_N // 2, PARTS // 2, SCALED, SPLIT, DROPOUT, SEPARATE, PRECISION, OUT_DESCRIPTOR,
        )  # fmt: skip
    else:
        low = tl.zeros((BLOCK_M, BLOCK_N), tl.float32) if SEPARATE else total
        low = add_low_rank(
            low, adapter, groups, first_group, first_row, first_column,
            SHRUNK, RANK, RANK_STEP, BLOCK_M, BLOCK_N, SCALED and not SEPARATE, SPLIT, PRECISION,
        )  # fmt: skip
        if SEPARATE:
            if SCALED:
                low *= adapter[8]
            if DROPOUT:
                low = drop_entries(low, keys_ptr, threshold, groups, first_row, first_column, BLOCK_M, BLOCK_N)
            low += total
        store_tile(
            low, first_row, segment_start + first_column, segment_start + width, ending,
            N, BLOCK_M, BLOCK_N, PARTS, OUT_DESCRIPTOR,
        )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "spans_ptr",
        "filled_ptr",
        "keys_ptr",
        "out_index_ptr",
        "residual_index_ptr",
        "rows",
        "row_tiles",
        "out_rows",
        "residual_rows",
    ]
)
def lora_gemm_kernel(
    x0, x1, x2, weight, bias_ptr, shrunk_ptr, expand0_ptr, expand1_ptr, expand2_ptr, y,
    spans_ptr, filled_ptr, keys_ptr, out_index_ptr, residual_ptr, residual_index_ptr, column_scale_ptr,
    rows, row_tiles, out_rows, residual_rows, stride_slot, stride_expand_n, stride_expand_r, scale, threshold,
    N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr,
    SHRUNK0: tl.constexpr, SHRUNK1: tl.constexpr, SHRUNK2: tl.constexpr, SHRUNK: tl.constexpr,
    RANK: tl.constexpr, RANK_STEP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
    TRANSPOSED: tl.constexpr, SCALED: tl.constexpr, SPLIT: tl.constexpr, DROPOUT: tl.constexpr, SEPARATE: tl.constexpr,
    PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr, OUT_DESCRIPTOR: tl.constexpr, PERSISTENT: tl.constexpr,
):  # fmt: skip
    """A program makes one tile of y, or walks over tiles where PERSISTENT.

    SHRUNK is the number of columns of S, SHRUNK0 to SHRUNK2 the first one of each segment, -1 for none.
    """
    program = tl.program_id(0)
    tables = (spans_ptr, filled_ptr)
    bank = (
        shrunk_ptr, expand0_ptr, expand1_ptr, expand2_ptr, stride_slot, stride_expand_n, stride_expand_r, scale
    )  # fmt: skip
    ending = (
        rows, y, out_index_ptr, out_rows, bias_ptr, column_scale_ptr, residual_ptr, residual_index_ptr, residual_rows
    )  # fmt: skip
    if PERSISTENT:
        tiles = row_tiles * (tl.cdiv(N0, BLOCK_N) + tl.cdiv(N1, BLOCK_N) + tl.cdiv(N2, BLOCK_N))
        for tile in tl.range(program, tiles, tl.num_programs(0), flatten=True, disallow_acc_multi_buffer=True):
            product_tile(
                tile, x0, x1, x2, weight, tables, bank, ending, row_tiles, keys_ptr, threshold,
                N0, N1, N2, K0, K1, K2, SHRUNK0, SHRUNK1, SHRUNK2, SHRUNK, RANK, RANK_STEP,
                BLOCK_M, BLOCK_N, BLOCK_K, PARTS, TRANSPOSED, SCALED, SPLIT, DROPOUT, SEPARATE,
                PRECISION, DESCRIPTORS, OUT_DESCRIPTOR,
            )  # fmt: skip
    else:
        product_tile(
            program, x0, x1, x2, weight, tables, bank, ending, row_tiles, keys_ptr, threshold,
            N0, N1, N2, K0, K1, K2, SHRUNK0, SHRUNK1, SHRUNK2, SHRUNK, RANK, RANK_STEP,
            BLOCK_M, BLOCK_N, BLOCK_K, PARTS, TRANSPOSED, SCALED, SPLIT, DROPOUT, SEPARATE,
            PRECISION, DESCRIPTORS, OUT_DESCRIPTOR,
        )  # fmt: skip


def _output(x: Sequence[Tensor], weight: Tensor, bias: Tensor | None, shrunk: Tensor, *rest: Any) -> Tensor:
    widths = rest[1]
    return shrunk.new_empty(shrunk.shape[0], sum(widths))


@register(SCHEMA, _output)
def lora_gemm(
    x: Sequence[Tensor], weight: Tensor, bias: Tensor | None, shrunk: Tensor, *rest: Any, **named: Any
) -> Tensor:
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
    _launch(y, None, x, weight, bias, shrunk, *rest, **named)
    return y


@register(ONTO_SCHEMA, in_place)
def lora_gemm_onto(out: Tensor, out_index: Tensor | None, *arguments: Any, **named: Any) -> None:
    """`lora_gemm` of the further arguments, written into some rows of `out`.

    out: contiguous [rows of a stream, N]; may be the residual if both have one index.
    out_index: int64 [rows], distinct; None: row i for row i. A row outside `out` is left out.
    """
    _launch(out, out_index, *arguments, **named)


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
    keys: Tensor | None = None,
    threshold: int = 0,
    transposed: bool = False,
    residual: Tensor | None = None,
    residual_index: Tensor | None = None,
    column_scale: Tensor | None = None,
) -> None:
    factors = [factor for factor in expand if factor is not None]
    rank = shrunk.shape[1] // len(factors)
    form = choose_form(GEMM_FORMS if keys is None else DROPOUT_FORMS, rank, x, weight, widths)
    operands = product_operands(form.tile, x, weight, transposed)
    straddling = padded_columns(form.tile, widths[:-1]) != sum(widths[:-1])
    output = None if straddling else output_descriptor(form, y, shrunk.shape[0], y_index)
    strides = factors[0].stride()
    missing = [None] * (MOST_LINEARS - len(widths))
    launch(
        lora_gemm_kernel,
        (programs(form, spans.shape[0], widths, shrunk.device),),
        *operands.inputs,
        operands.weight,
        bias,
        shrunk,
        *(factors[0] if factor is None else factor for factor in (*expand, *missing)),
        y if output is None else output,
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
        *(strides[0], strides[2], strides[1]) if transposed else strides,
        scale,
        threshold,
        **_extents(operands.depths, expand, widths, shrunk, rank),
        TRANSPOSED=operands.transposed,
        **_scaling(scale, shrunk, form),
        DROPOUT=keys is not None,
        PRECISION=dot_precision(shrunk),
        DESCRIPTORS=operands.descriptors,
        OUT_DESCRIPTOR=output is not None,
        SEPARATE=form.separate,
        **form.options,
    )


def _scaling(scale: float | None, shrunk: Tensor, form: Form) -> dict[str, bool]:
    """How the low-rank product is scaled: alone in its accumulator, or by S, which a power of two leaves exact."""
    exact = scale is None or form.separate or shrunk.dtype == torch.float32 or abs(math.frexp(scale)[0]) == 0.5
    return {"SCALED": scale is not None, "SPLIT": not exact}


def _extents(
    depths: Sequence[int], expand: Sequence[Tensor | None], widths: Sequence[int], shrunk: Tensor, rank: int
) -> dict[str, int]:
    """Columns of each piece of x; of each segment its columns, and its first column of S; what is said of the rank."""
    options = {"SHRUNK": shrunk.shape[1], "RANK": rank, "RANK_STEP": rank_step(shrunk.dtype, rank)}
    options |= {f"K{number}": depth for number, depth in enumerate(depths)}
    column = 0
    for number in range(MOST_LINEARS):
        adapted = number < len(widths) and expand[number] is not None
        options[f"N{number}"] = widths[number] if number < len(widths) else 0
        options[f"SHRUNK{number}"] = column if adapted else -1
        column += rank if adapted else 0
    return options
