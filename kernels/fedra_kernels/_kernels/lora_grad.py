"""Gradients of the adapters of `lora_linear`, in two halves.

First every chunk of rows, counted from its group's start, has one writer for its fp32 partial sums: `lora_grad_output`
makes dS = scale dY B_k and the partials of dB_k = dY^T S from one read of dY, `lora_grad_outer` those of one factor
alone, such as dA_k = dS^T drop(x). Then `lora_grad_reduce` adds a group's partials into the gradient sinks, in order:
no atomics, and a client's gradient depends on its own rows alone. Both factors share its launch.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import in_place, launch, register
from .configs import ConfigTable, Tile, choose, low_rank_options
from .counter_hash import keep_entries, row_seeds
from .row_tables import load_chunk, load_chunk_group

OUTPUT_SCHEMA = (
    "lora_grad_output(Tensor grad_y, Tensor lora_b, Tensor shrunk, Tensor chunks, float scale) -> (Tensor, Tensor)"
)
OUTER_SCHEMA = (
    "lora_grad_outer(Tensor wide, Tensor narrow, Tensor chunks, Tensor? keys, int threshold, bool transposed) -> Tensor"
)
REDUCE_SCHEMA = (
    "lora_grad_reduce(Tensor? partial_a, Tensor? groups_a, Tensor(a!)? grad_a, Tensor? partial_b, "
    "Tensor? groups_b, Tensor(b!)? grad_b, float scale) -> ()"
)
REDUCE_BLOCK = 1024

# A chunk is one block of rows.
OUTPUT_CONFIGS: ConfigTable = {
    "sm_80": {"narrow": Tile(256, 64, 1, 8, 2), "float": Tile(64, 32, 1, 4, 2)},
    "sm_90": {"narrow": Tile(256, 64, 1, 8, 3), "float": Tile(64, 32, 1, 4, 2)},
    "sm_100": {"narrow": Tile(256, 64, 1, 8, 3), "float": Tile(64, 32, 1, 4, 2)},
    "gfx942": {"narrow": Tile(128, 64, 1, 8, 2), "float": Tile(64, 32, 1, 4, 2)},
    "small": {"narrow": Tile(128, 64, 1, 8, 2), "float": Tile(64, 32, 1, 4, 2)},
    "interpreter": dict.fromkeys(("narrow", "float"), Tile(32, 32, 1, 4, 1)),
}

# A chunk is CHUNK_BLOCKS blocks of rows.
OUTER_CONFIGS: ConfigTable = {
    "sm_80": {"narrow": Tile(64, 128, 1, 4, 4), "wide": Tile(64, 64, 1, 8, 3), "float": Tile(32, 64, 1, 4, 3)},
    "sm_90": {"narrow": Tile(64, 128, 1, 4, 4), "wide": Tile(64, 64, 1, 4, 4), "float": Tile(32, 64, 1, 4, 3)},
    "sm_100": {"narrow": Tile(64, 128, 1, 4, 4), "wide": Tile(64, 128, 1, 4, 3), "float": Tile(32, 64, 1, 4, 3)},
    "gfx942": {"narrow": Tile(64, 128, 1, 4, 2), "wide": Tile(32, 64, 1, 4, 2), "float": Tile(32, 64, 1, 4, 2)},
    "small": {"narrow": Tile(64, 128, 1, 8, 3), "wide": Tile(64, 64, 1, 4, 2), "float": Tile(32, 64, 1, 4, 2)},
    "interpreter": dict.fromkeys(("narrow", "wide", "float"), Tile(16, 32, 1, 4, 1)),
}
CHUNK_BLOCKS = 16


def output_chunk(grad_y: Tensor, rank: int) -> int:
    """Rows of a chunk of `lora_grad_output`."""
    return choose(OUTPUT_CONFIGS, grad_y, rank).rows


def outer_chunk(wide: Tensor, rank: int) -> int:
    """Rows of a chunk of `lora_grad_outer`."""
    return choose(OUTER_CONFIGS, wide, rank).rows * CHUNK_BLOCKS


@triton.jit(do_not_specialize=["chunks_ptr"])
def lora_grad_output_kernel(
    grad_y_ptr,
    lora_b_ptr,
    shrunk_ptr,
    grad_shrunk_ptr,
    partial_ptr,
    chunks_ptr,
    stride_slot,
    scale,
    N: tl.constexpr,
    RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dS = scale dY B_k, and this chunk's dY^T S."""
    program = tl.program_id(0)
    first, end, slot, _, _ = load_chunk(chunks_ptr, program)
    row = first + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    rank = tl.arange(0, RANK_BLOCK)
    row_mask = (row < end)[:, None]
    rank_mask = (rank < RANK)[None, :]
    row_offset = row.to(tl.int64)[:, None]
    shrunk = tl.load(shrunk_ptr + row_offset * RANK + rank[None, :], mask=row_mask & rank_mask, other=0.0)
    grad_y_ptrs = grad_y_ptr + row_offset * N + column[None, :]
    factor_offset = column[:, None] * RANK + rank[None, :]
    factor_ptrs = lora_b_ptr + slot * stride_slot + factor_offset
    partial_ptrs = partial_ptr + program.to(tl.int64) * (N * RANK) + factor_offset
    grad_shrunk = tl.zeros((BLOCK_M, RANK_BLOCK), tl.float32)
    for n in range(0, N, BLOCK_N):
        inside = n + column < N
        factor_mask = inside[:, None] & rank_mask
        grad_y = tl.load(grad_y_ptrs, mask=row_mask & inside[None, :], other=0.0)
        factor = tl.load(factor_ptrs, mask=factor_mask, other=0.0)
        grad_shrunk = tl.dot(grad_y, factor, grad_shrunk, input_precision=PRECISION)
        partial = tl.dot(tl.trans(grad_y), shrunk, input_precision=PRECISION)
        tl.store(partial_ptrs, partial, mask=factor_mask)
        grad_y_ptrs += BLOCK_N
        factor_ptrs += BLOCK_N * RANK
        partial_ptrs += BLOCK_N * RANK
    grad_shrunk_ptrs = grad_shrunk_ptr + row_offset * RANK + rank[None, :]
    grad_shrunk = (grad_shrunk * scale).to(grad_shrunk_ptr.dtype.element_ty)
    tl.store(grad_shrunk_ptrs, grad_shrunk, mask=row_mask & rank_mask)


def _output_gradients(grad_y: Tensor, lora_b: Tensor, shrunk: Tensor, chunks: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    entries = lora_b.shape[1] * lora_b.shape[2]
    return shrunk.new_empty(shrunk.shape), grad_y.new_empty(chunks.shape[0], entries, dtype=torch.float32)


@register(OUTPUT_SCHEMA, _output_gradients)
def lora_grad_output(
    grad_y: Tensor, lora_b: Tensor, shrunk: Tensor, chunks: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """dS [rows, rank] of grad_y [rows, out], and the chunks' partial sums of dY^T S, fp32 [chunks, out * rank].

    For ranks up to NARROW_RANK. shrunk [rows, rank]; chunks: `RowGroups.chunks(output_chunk(grad_y, rank)).rows`.
    """
    outputs, rank = lora_b.shape[1:]
    tile = choose(OUTPUT_CONFIGS, grad_y, rank)
    grad_shrunk, partial = _output_gradients(grad_y, lora_b, shrunk, chunks)
    launch(
        lora_grad_output_kernel,
        (chunks.shape[0],),
        grad_y,
        lora_b,
        shrunk,
        grad_shrunk,
        partial,
        chunks,
        lora_b.stride(0),
        scale,
        N=outputs,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.columns,
        **low_rank_options(grad_y, rank),
        **tile.options,
    )
    return grad_shrunk, partial


@triton.jit(do_not_specialize=["chunks_ptr", "keys_ptr"])
def lora_grad_outer_kernel(
    wide_ptr,
    narrow_ptr,
    partial_ptr,
    chunks_ptr,
    keys_ptr,
    threshold,
    stride_column,
    stride_rank,
    C: tl.constexpr,
    RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """This chunk's drop(wide)^T narrow, for one block of wide's columns."""
    program = tl.program_id(0)
    start, end, _, group, group_start = load_chunk(chunks_ptr, program)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    rank = tl.arange(0, RANK_BLOCK)
    column_mask = column < C
    rank_mask = rank < RANK
    total = tl.zeros((BLOCK_C, RANK_BLOCK), tl.float32)
    for first in range(start, end, BLOCK_M):
        row = first + tl.arange(0, BLOCK_M)
        row_mask = (row < end)[:, None]
        row_offset = row.to(tl.int64)[:, None]
        wide = tl.load(wide_ptr + row_offset * C + column[None, :], mask=row_mask & column_mask[None, :], other=0.0)
        if DROPOUT:
            seeds = row_seeds(keys_ptr, group, row - group_start)
            wide = tl.where(keep_entries(seeds, column, threshold), wide, 0.0)
        narrow = tl.load(narrow_ptr + row_offset * RANK + rank[None, :], mask=row_mask & rank_mask[None, :], other=0.0)
        total = tl.dot(tl.trans(wide), narrow, total, input_precision=PRECISION)
    partial_ptrs = (
        partial_ptr + program.to(tl.int64) * (C * RANK) + column[:, None] * stride_column + rank[None, :] * stride_rank
    )
    tl.store(partial_ptrs, total, mask=column_mask[:, None] & rank_mask[None, :])


def _outer_partials(wide: Tensor, narrow: Tensor, chunks: Tensor, *_: Any) -> Tensor:
    return wide.new_empty(chunks.shape[0], wide.shape[1] * narrow.shape[1], dtype=torch.float32)


@register(OUTER_SCHEMA, _outer_partials)
def lora_grad_outer(
    wide: Tensor, narrow: Tensor, chunks: Tensor, keys: Tensor | None, threshold: int, transposed: bool
) -> Tensor:
    """The chunks' partial sums of drop(wide)^T narrow, fp32 [chunks, C * rank] (transposed: each as [rank, C]).

    wide [rows, C], narrow [rows, rank]; chunks: `RowGroups.chunks(outer_chunk(wide, rank)).rows`.
    """
    columns, rank = wide.shape[1], narrow.shape[1]
    tile = choose(OUTER_CONFIGS, wide, rank)
    partial = _outer_partials(wide, narrow, chunks)
    stride_column, stride_rank = (1, columns) if transposed else (rank, 1)
    launch(
        lora_grad_outer_kernel,
        (chunks.shape[0], triton.cdiv(columns, tile.columns)),
        wide,
        narrow,
        partial,
        chunks,
        keys,
        threshold,
        stride_column,
        stride_rank,
        C=columns,
        BLOCK_M=tile.rows,
        BLOCK_C=tile.columns,
        DROPOUT=keys is not None,
        **low_rank_options(wide, rank),
        **tile.options,
    )
    return partial


@triton.jit
def _add_piece(
    grad_ptr, partial_ptr, groups_ptr, stride_slot, number, piece, entries, scale,
    BLOCK: tl.constexpr, TRAINED: tl.constexpr,
):  # fmt: skip
    """grad[slot] += scale times a group's partials, summed in their order, for one piece of a trained factor."""
    if TRAINED:
        slot, _, first, end = load_chunk_group(groups_ptr, number)
        # In 32 bits, which hold the entries of any factor: sm_100 would spill.
        offset = piece * BLOCK + tl.arange(0, BLOCK)
        mask = offset < entries
        total = tl.zeros((BLOCK,), tl.float32)
        partial_ptrs = partial_ptr + first.to(tl.int64) * entries + offset
        for _ in range(first, end):
            total += tl.load(partial_ptrs, mask=mask, other=0.0)
            partial_ptrs += entries
        total *= scale
        grad_ptrs = grad_ptr + slot * stride_slot + offset
        previous = tl.load(grad_ptrs, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_ptrs, (previous + total).to(grad_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["groups_a_ptr", "groups_b_ptr"])
def lora_grad_reduce_kernel(
    partial_a_ptr,
    groups_a_ptr,
    grad_a_ptr,
    partial_b_ptr,
    groups_b_ptr,
    grad_b_ptr,
    stride_a,
    stride_b,
    scale,
    entries_a,
    entries_b,
    BLOCK: tl.constexpr,
    HAS_A: tl.constexpr,
    HAS_B: tl.constexpr,
):
    """One program adds one piece of one factor of one group: the pieces of dA, then those of dB."""
    pieces_a = tl.cdiv(entries_a, BLOCK)
    pieces = pieces_a + tl.cdiv(entries_b, BLOCK)
    number = tl.program_id(0) // pieces
    piece = tl.program_id(0) % pieces
    if piece < pieces_a:
        _add_piece(
            grad_a_ptr, partial_a_ptr, groups_a_ptr, stride_a, number, piece, entries_a, 1.0, BLOCK, HAS_A,
        )  # fmt: skip
    else:
        # dA has been made of scaled rows, dB has not.
        _add_piece(
            grad_b_ptr, partial_b_ptr, groups_b_ptr, stride_b, number, piece - pieces_a, entries_b, scale, BLOCK, HAS_B,
        )  # fmt: skip


@register(REDUCE_SCHEMA, in_place)
def lora_grad_reduce(
    partial_a: Tensor | None,
    groups_a: Tensor | None,
    grad_a: Tensor | None,
    partial_b: Tensor | None,
    groups_b: Tensor | None,
    grad_b: Tensor | None,
    scale: float,
) -> None:
    """grad_a[slot] += a group's partials of dA; grad_b[slot] += scale times its partials of dB.

    partial_a fp32 [chunks, rank * in], groups_a: `Chunks.groups` of these, grad_a [slots, rank, in]; likewise for B.
    Each factor's three are None where it is frozen.
    """
    groups = groups_a if groups_a is not None else groups_b
    if groups is None:
        return
    entries = [0 if partial is None else partial.shape[1] for partial in (partial_a, partial_b)]
    launch(
        lora_grad_reduce_kernel,
        (groups.shape[0] * sum(triton.cdiv(count, REDUCE_BLOCK) for count in entries),),
        partial_a,
        groups_a,
        grad_a,
        partial_b,
        groups_b,
        grad_b,
        *(0 if sink is None else sink.stride(0) for sink in (grad_a, grad_b)),
        scale,
        *entries,
        BLOCK=REDUCE_BLOCK,
        HAS_A=partial_a is not None,
        HAS_B=partial_b is not None,
        num_warps=4,
    )
