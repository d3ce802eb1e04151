"""Gradient of one low-rank factor: drop(wide)^T narrow for the rows of each group, such as dA_k = dS^T drop(x)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import ConfigTable, Tile, choose, rank_block
from .counter_hash_kernels import keep_entries, row_seeds
from .dispatch import dot_precision, launch, register
from .row_tables_kernels import load_chunk

SCHEMA = (
    "lora_grad_outer(Tensor wide, Tensor narrow, Tensor chunks, Tensor? keys, int threshold, bool transposed) -> Tensor"
)

# A chunk is CHUNK_BLOCKS blocks of rows.
CONFIGS: ConfigTable = {
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


def outer_chunk(wide: Tensor, rank: int) -> int:
    """Rows of a chunk of `lora_grad_outer`."""
    return choose(CONFIGS, wide, rank).rows * CHUNK_BLOCKS


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


def _fake(
    wide: Tensor, narrow: Tensor, chunks: Tensor, keys: Tensor | None, threshold: int, transposed: bool
) -> Tensor:
    return wide.new_empty(chunks.shape[0], wide.shape[1] * narrow.shape[1], dtype=torch.float32)


@register(SCHEMA, _fake)
def lora_grad_outer(
    wide: Tensor, narrow: Tensor, chunks: Tensor, keys: Tensor | None, threshold: int, transposed: bool
) -> Tensor:
    """The chunks' partial sums of drop(wide)^T narrow, fp32 [chunks, C * rank] (transposed: each as [rank, C]).

    wide [rows, C], narrow [rows, rank]; chunks: `RowGroups.chunks(outer_chunk(wide, rank)).rows`.
    """
    columns, rank = wide.shape[1], narrow.shape[1]
    tile = choose(CONFIGS, wide, rank)
    partial = _fake(wide, narrow, chunks, keys, threshold, transposed)
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
    return partial
