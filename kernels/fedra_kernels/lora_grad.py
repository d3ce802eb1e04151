"""Adapter gradients: dS and dB from one read of dY, dA from one read of x. Deterministic, no atomics.

A chunk of rows, counted from its group's start, has one writer for its fp32 partial sums; a second kernel adds
a group's partials in order into the gradient sink. So a client's gradient depends on its own rows alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import ConfigTable, Tile, choose, rank_block
from .counter_hash_kernels import keep_entries, row_seeds
from .dispatch import dot_precision, launch, register

REDUCE_BLOCK = 1024

OUTPUT_SCHEMA = (
    "lora_grad_output(Tensor grad_y, Tensor lora_b, Tensor shrunk, Tensor chunks, Tensor chunk_groups, "
    "Tensor scales, float gain, Tensor(a!) grad_b) -> Tensor"
)
OUTER_SCHEMA = (
    "lora_grad_outer(Tensor wide, Tensor narrow, Tensor chunks, Tensor chunk_groups, Tensor? scales, "
    "float gain, Tensor? keys, int threshold, bool transposed, Tensor(a!) sink) -> ()"
)

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
    "sm_80": {
        "narrow": Tile(64, 128, 1, 4, 4),
        "wide": Tile(64, 64, 1, 8, 3),
        "float": Tile(32, 64, 1, 4, 3),
    },
    "sm_90": {
        "narrow": Tile(64, 128, 1, 4, 4),
        "wide": Tile(64, 64, 1, 4, 4),
        "float": Tile(32, 64, 1, 4, 3),
    },
    "sm_100": {
        "narrow": Tile(64, 128, 1, 4, 4),
        "wide": Tile(64, 128, 1, 4, 3),
        "float": Tile(32, 64, 1, 4, 3),
    },
    "gfx942": {
        "narrow": Tile(64, 128, 1, 4, 2),
        "wide": Tile(32, 64, 1, 4, 2),
        "float": Tile(32, 64, 1, 4, 2),
    },
    "small": {
        "narrow": Tile(64, 128, 1, 8, 3),
        "wide": Tile(64, 64, 1, 4, 2),
        "float": Tile(32, 64, 1, 4, 2),
    },
    "interpreter": dict.fromkeys(("narrow", "wide", "float"), Tile(16, 32, 1, 4, 1)),
}
CHUNK_BLOCKS = 16


def output_chunk(grad_y: Tensor, rank: int) -> int:
    """Rows of a chunk of `lora_grad_output`."""
    return choose(OUTPUT_CONFIGS, grad_y, rank).rows


def outer_chunk(wide: Tensor, rank: int) -> int:
    """Rows of a chunk of `lora_grad_outer`."""
    return choose(OUTER_CONFIGS, wide, rank).rows * CHUNK_BLOCKS


@triton.jit
def lora_grad_output_kernel(
    grad_y_ptr,
    lora_b_ptr,
    shrunk_ptr,
    grad_shrunk_ptr,
    partial_ptr,
    chunks_ptr,
    scales_ptr,
    stride_slot,
    gain,
    N: tl.constexpr,
    RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dS = gain * scale_k dY B_k, and this chunk's dY^T S."""
    program = tl.program_id(0)
    chunk = chunks_ptr + 5 * program
    end = tl.load(chunk + 1)
    slot = tl.load(chunk + 2).to(tl.int64)
    scale = tl.load(scales_ptr + tl.load(chunk + 3)) * gain
    row = tl.load(chunk) + tl.arange(0, BLOCK_M)
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


@triton.jit
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
    chunk = chunks_ptr + 5 * program
    start = tl.load(chunk)
    end = tl.load(chunk + 1)
    group = tl.load(chunk + 3)
    group_start = tl.load(chunk + 4)
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


@triton.jit
def lora_grad_reduce_kernel(
    sink_ptr,
    partial_ptr,
    chunk_groups_ptr,
    scales_ptr,
    stride_slot,
    gain,
    entries,
    BLOCK: tl.constexpr,
    SCALED: tl.constexpr,
):
    """sink[slot] += gain * scale_k times the sum of a group's partials, in the order of its chunks."""
    table = chunk_groups_ptr + 4 * tl.program_id(0)
    slot = tl.load(table).to(tl.int64)
    offset = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < entries
    total = tl.zeros((BLOCK,), tl.float32)
    first = tl.load(table + 2)
    partial_ptrs = partial_ptr + first.to(tl.int64) * entries + offset
    for _ in range(first, tl.load(table + 3)):
        total += tl.load(partial_ptrs, mask=mask, other=0.0)
        partial_ptrs += entries
    if SCALED:
        total *= tl.load(scales_ptr + tl.load(table + 1)) * gain
    sink_ptrs = sink_ptr + slot * stride_slot + offset
    previous = tl.load(sink_ptrs, mask=mask, other=0.0).to(tl.float32)
    tl.store(sink_ptrs, (previous + total).to(sink_ptr.dtype.element_ty), mask=mask)


def _reduce(sink: Tensor, partial: Tensor, chunk_groups: Tensor, scales: Tensor | None, gain: float) -> None:
    entries = partial.shape[1]
    launch(
        lora_grad_reduce_kernel,
        (chunk_groups.shape[0], triton.cdiv(entries, REDUCE_BLOCK)),
        sink,
        partial,
        chunk_groups,
        scales,
        sink.stride(0),
        gain,
        entries,
        BLOCK=REDUCE_BLOCK,
        SCALED=scales is not None,
        num_warps=4,
    )


def _fake_output(
    grad_y: Tensor,
    lora_b: Tensor,
    shrunk: Tensor,
    chunks: Tensor,
    chunk_groups: Tensor,
    scales: Tensor,
    gain: float,
    grad_b: Tensor,
) -> Tensor:
    return torch.empty_like(shrunk)


@register(OUTPUT_SCHEMA, _fake_output)
def lora_grad_output(
    grad_y: Tensor,
    lora_b: Tensor,
    shrunk: Tensor,
    chunks: Tensor,
    chunk_groups: Tensor,
    scales: Tensor,
    gain: float,
    grad_b: Tensor,
) -> Tensor:
    """dS [rows, rank] of grad_y [rows, out]; adds dB into grad_b [slots, out, rank].

    For ranks up to NARROW_RANK. shrunk [rows, rank]; chunks, chunk_groups: `RowGroups.chunks(output_chunk)`.
    """
    outputs, rank = lora_b.shape[1:]
    tile = choose(OUTPUT_CONFIGS, grad_y, rank)
    grad_shrunk = torch.empty_like(shrunk)
    partial = grad_y.new_empty(chunks.shape[0], outputs * rank, dtype=torch.float32)
    launch(
        lora_grad_output_kernel,
        (chunks.shape[0],),
        grad_y,
        lora_b,
        shrunk,
        grad_shrunk,
        partial,
        chunks,
        scales,
        lora_b.stride(0),
        gain,
        N=outputs,
        RANK=rank,
        RANK_BLOCK=rank_block(rank),
        BLOCK_M=tile.rows,
        BLOCK_N=tile.columns,
        PRECISION=dot_precision(grad_y),
        **tile.options,
    )
    _reduce(grad_b, partial, chunk_groups, scales, gain)
    return grad_shrunk


def _fake_outer(
    wide: Tensor,
    narrow: Tensor,
    chunks: Tensor,
    chunk_groups: Tensor,
    scales: Tensor | None,
    gain: float,
    keys: Tensor | None,
    threshold: int,
    transposed: bool,
    sink: Tensor,
) -> None:
    return None


@register(OUTER_SCHEMA, _fake_outer)
def lora_grad_outer(
    wide: Tensor,
    narrow: Tensor,
    chunks: Tensor,
    chunk_groups: Tensor,
    scales: Tensor | None,
    gain: float,
    keys: Tensor | None,
    threshold: int,
    transposed: bool,
    sink: Tensor,
) -> None:
    """Add each group's drop(wide)^T narrow, times gain * scale_k where scales are given, into its slot.

    wide [rows, C], narrow [rows, rank]; sink [slots, C, rank] (transposed: [slots, rank, C]);
    chunks, chunk_groups: `RowGroups.chunks(outer_chunk)`.
    """
    columns, rank = wide.shape[1], narrow.shape[1]
    tile = choose(OUTER_CONFIGS, wide, rank)
    partial = wide.new_empty(chunks.shape[0], columns * rank, dtype=torch.float32)
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
        RANK=rank,
        RANK_BLOCK=rank_block(rank),
        BLOCK_M=tile.rows,
        BLOCK_C=tile.columns,
        DROPOUT=keys is not None,
        PRECISION=dot_precision(wide),
        **tile.options,
    )
    _reduce(sink, partial, chunk_groups, scales, gain)
