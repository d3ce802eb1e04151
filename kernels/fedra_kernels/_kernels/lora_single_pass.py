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
from .configs import Tile, low_rank_options
from .lora_gemm import swizzled_tile
from .low_rank_tiles import add_expand, load_factor
from .product_forms import SINGLE_PASS_FORMS, choose_form, form_tile, programs
from .row_tables import load_filled, load_span
from .tile_loads import product_operands, row_block, weight_block
from .tile_stores import output_descriptor, store_tile

_ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, Tensor spans, Tensor filled, float scale, "
    "Tensor? residual=None, Tensor? residual_index=None, Tensor? column_scale=None"
)
SCHEMA = f"lora_single_pass({_ARGUMENTS}) -> (Tensor, Tensor)"
ONTO_SCHEMA = f"lora_single_pass_onto(Tensor(a!) out, Tensor? out_index, {_ARGUMENTS}) -> Tensor"


def single_pass_tile(x: Tensor, rank: int) -> Tile:
    """A tile with the rows that every form of `lora_single_pass` has for this dtype and rank."""
    return form_tile(SINGLE_PASS_FORMS, x, rank)


@triton.jit
def shrink_block(
    lora_a_ptr, k, stride_rank, stride_depth,
    K: tl.constexpr, RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """[BLOCK_K, RANK_BLOCK] of a slot's A^T; zeros outside."""
    depth = (k + tl.arange(0, BLOCK_K))[:, None]
    rank = tl.arange(0, RANK_BLOCK)[None, :]
    return tl.load(lora_a_ptr + rank * stride_rank + depth * stride_depth, mask=(rank < RANK) & (depth < K), other=0.0)


@triton.jit
def expand_own(
    total, shrunk, group_start, group_end, slot, first_row, first_column, shrunk_ptr, lora_b_ptr, strides_b, scale,
    N: tl.constexpr, RANK: tl.constexpr, RANK_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """total + scale S B_k^T in the rows of a group; a tile of the first columns also stores this S."""
    row, column = first_row + tl.arange(0, BLOCK_M), first_column + tl.arange(0, BLOCK_N)
    rank = tl.arange(0, RANK_BLOCK)
    own = (row >= group_start) & (row < group_end)
    mine = tl.where(own[:, None], shrunk, 0.0)
    if first_column == 0:
        shrunk_ptrs = shrunk_ptr + row.to(tl.int64)[:, None] * RANK + rank[None, :]
        tl.store(shrunk_ptrs, mine.to(shrunk_ptr.dtype.element_ty), mask=own[:, None] & (rank < RANK)[None, :])
    stride_slot, stride_n, stride_rank = strides_b
    factor = load_factor(lora_b_ptr + slot * stride_slot, column, rank, stride_n, stride_rank, N, RANK)
    return add_expand(total, mine, own, factor, scale, True, False, PRECISION)


@triton.jit
def single_pass_of_tile(
    tile, x, weight, lora_a_ptr, lora_b_ptr, shrunk_ptr, spans_ptr, filled_ptr, ending, row_tiles,
    strides_a, strides_b, scale,
    N: tl.constexpr, K: tl.constexpr, RANK: tl.constexpr, RANK_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
    TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr, OUT_DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """One tile of y, and S where it has the first columns."""
    tile_m, tile_n = swizzled_tile(tile, row_tiles, tl.cdiv(N, BLOCK_N), 8)
    first_row, first_column, rows = tile_m * BLOCK_M, tile_n * BLOCK_N, ending[0]
    first, end = load_span(spans_ptr, tile_m)
    group_start, group_end, slot, _ = load_filled(filled_ptr, first)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    shrunk = tl.zeros((BLOCK_M, RANK_BLOCK), tl.float32)
    for k in range(0, K, BLOCK_K):
        left = row_block(x, first_row, rows, k, K, BLOCK_M, BLOCK_K, DESCRIPTORS)
        right = weight_block(
            weight, first_column, k, K, N, K, K % BLOCK_K != 0, TRANSPOSED, BLOCK_N, BLOCK_K, DESCRIPTORS
        )
        factor = shrink_block(
            lora_a_ptr + slot * strides_a[0], k, strides_a[1], strides_a[2], K, RANK, RANK_BLOCK, BLOCK_K
        )
        total = tl.dot(left, right, total, input_precision=PRECISION)
        shrunk = tl.dot(left, factor, shrunk, input_precision=PRECISION)
    total = expand_own(
        total, shrunk, group_start, group_end, slot, first_row, first_column, shrunk_ptr, lora_b_ptr, strides_b,
        scale, N, RANK, RANK_BLOCK, BLOCK_M, BLOCK_N, PRECISION,
    )  # fmt: skip
    # Without the condition, which is the loop's own, Triton does not fuse the loops over tiles and depth.
    if first + 1 < end:
        for index in tl.range(first + 1, end, num_stages=1):
            group_start, group_end, slot, _ = load_filled(filled_ptr, index)
            shrunk = tl.zeros((BLOCK_M, RANK_BLOCK), tl.float32)
            # The stages of this loop lie in shared memory beside those of the first.
            for k in tl.range(0, K, BLOCK_K, num_stages=2):
                left = row_block(x, first_row, rows, k, K, BLOCK_M, BLOCK_K, DESCRIPTORS)
                factor = shrink_block(
                    lora_a_ptr + slot * strides_a[0], k, strides_a[1], strides_a[2], K, RANK, RANK_BLOCK, BLOCK_K
                )
                shrunk = tl.dot(left, factor, shrunk, input_precision=PRECISION)
            total = expand_own(
                total, shrunk, group_start, group_end, slot, first_row, first_column, shrunk_ptr, lora_b_ptr,
                strides_b, scale, N, RANK, RANK_BLOCK, BLOCK_M, BLOCK_N, PRECISION,
            )  # fmt: skip
    store_tile(total, first_row, first_column, N, ending, N, BLOCK_M, BLOCK_N, PARTS, OUT_DESCRIPTOR)


@triton.jit(
    do_not_specialize=[
        "spans_ptr",
        "filled_ptr",
        "out_index_ptr",
        "residual_index_ptr",
        "rows",
        "row_tiles",
        "out_rows",
        "residual_rows",
    ]
)
def lora_single_pass_kernel(
    x, weight, bias_ptr, lora_a_ptr, lora_b_ptr, y, shrunk_ptr,
    spans_ptr, filled_ptr, out_index_ptr, residual_ptr, residual_index_ptr, column_scale_ptr,
    rows, row_tiles, out_rows, residual_rows,
    stride_slot_a, stride_rank_a, stride_depth_a, stride_slot_b, stride_n_b, stride_rank_b, scale,
    N: tl.constexpr, K: tl.constexpr, RANK: tl.constexpr, RANK_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
    TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr, OUT_DESCRIPTOR: tl.constexpr,
    PERSISTENT: tl.constexpr,
):  # fmt: skip
    """A program makes one tile of y, or walks over tiles where PERSISTENT."""
    program = tl.program_id(0)
    strides_a, strides_b = (stride_slot_a, stride_rank_a, stride_depth_a), (stride_slot_b, stride_n_b, stride_rank_b)
    ending = (
        rows, y, out_index_ptr, out_rows, bias_ptr, column_scale_ptr, residual_ptr, residual_index_ptr, residual_rows
    )  # fmt: skip
    if PERSISTENT:
        for tile in tl.range(program, row_tiles * tl.cdiv(N, BLOCK_N), tl.num_programs(0), flatten=True):
            single_pass_of_tile(
                tile, x, weight, lora_a_ptr, lora_b_ptr, shrunk_ptr, spans_ptr, filled_ptr, ending, row_tiles,
                strides_a, strides_b, scale, N, K, RANK, RANK_BLOCK, BLOCK_M, BLOCK_N, BLOCK_K, PARTS,
                TRANSPOSED, PRECISION, DESCRIPTORS, OUT_DESCRIPTOR,
            )  # fmt: skip
    else:
        single_pass_of_tile(
            program, x, weight, lora_a_ptr, lora_b_ptr, shrunk_ptr, spans_ptr, filled_ptr, ending, row_tiles,
            strides_a, strides_b, scale, N, K, RANK, RANK_BLOCK, BLOCK_M, BLOCK_N, BLOCK_K, PARTS,
            TRANSPOSED, PRECISION, DESCRIPTORS, OUT_DESCRIPTOR,
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
        lora_a: [slots, rank, K]; of any strides, as lora_b.
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
    form = choose_form(SINGLE_PASS_FORMS, rank, [x], weight, [weight.shape[0]])
    operands = product_operands(form.tile, [x], weight, False)
    output = output_descriptor(form, y, x.shape[0], y_index)
    launch(
        lora_single_pass_kernel,
        (programs(form, spans.shape[0], [weight.shape[0]], x.device),),
        operands.inputs[0],
        operands.weight,
        bias,
        lora_a,
        lora_b,
        y if output is None else output,
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
        *lora_a.stride(),
        *lora_b.stride(),
        scale,
        N=y.shape[1],
        K=x.shape[1],
        TRANSPOSED=operands.transposed,
        DESCRIPTORS=operands.descriptors,
        OUT_DESCRIPTOR=output is not None,
        **low_rank_options(x, rank),
        **form.options,
    )
