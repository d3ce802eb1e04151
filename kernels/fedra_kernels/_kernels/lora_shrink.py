"""Grouped low-rank shrink: S = drop(x) A_k^T for the rows of group k."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import launch, register
from .configs import ConfigTable, Tile, choose, low_rank_options
from .counter_hash import keep_entries, row_seeds
from .row_tables import load_chunk

SCHEMA = (
    "lora_shrink(Tensor x, Tensor factor, Tensor chunks, float scale, "
    "Tensor? keys, int threshold, bool transposed) -> Tensor"
)

CONFIGS: ConfigTable = {
    "sm_80": {"narrow": Tile(64, 1, 128, 4, 4), "wide": Tile(64, 1, 64, 4, 3), "float": Tile(64, 1, 32, 4, 3)},
    "sm_90": {"narrow": Tile(64, 1, 128, 4, 4), "wide": Tile(64, 1, 64, 4, 4), "float": Tile(64, 1, 32, 4, 3)},
    "sm_100": {"narrow": Tile(128, 1, 64, 4, 3), "wide": Tile(128, 1, 64, 4, 3), "float": Tile(64, 1, 32, 4, 3)},
    "gfx942": {"narrow": Tile(64, 1, 128, 4, 2), "wide": Tile(64, 1, 64, 4, 2), "float": Tile(64, 1, 32, 4, 2)},
    "small": {"narrow": Tile(64, 1, 128, 4, 3), "wide": Tile(64, 1, 64, 4, 3), "float": Tile(64, 1, 32, 4, 2)},
    "interpreter": dict.fromkeys(("narrow", "wide", "float"), Tile(16, 1, 32, 4, 1)),
}


def shrink_tile(x: Tensor, rank: int) -> Tile:
    """The tile of `lora_shrink`."""
    return choose(CONFIGS, x, rank)


@triton.jit(do_not_specialize=["chunks_ptr", "keys_ptr"])
def lora_shrink_kernel(
    x_ptr,
    factor_ptr,
    shrunk_ptr,
    chunks_ptr,
    keys_ptr,
    stride_slot,
    stride_rank,
    stride_depth,
    scale,
    threshold,
    K: tl.constexpr,
    RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program makes S of one chunk."""
    first, end, slot, group, group_start = load_chunk(chunks_ptr, tl.program_id(0))
    row = first + tl.arange(0, BLOCK_M)
    depth = tl.arange(0, BLOCK_K)
    rank = tl.arange(0, RANK_BLOCK)
    row_mask = (row < end)[:, None]
    rank_mask = (rank < RANK)[None, :]
    if DROPOUT:
        seeds = row_seeds(keys_ptr, group, row - group_start)
    x_ptrs = x_ptr + row.to(tl.int64)[:, None] * K + depth[None, :]
    factor_ptrs = (
        factor_ptr
        + slot * stride_slot
        + rank.to(tl.int64)[None, :] * stride_rank
        + depth.to(tl.int64)[:, None] * stride_depth
    )
    total = tl.zeros((BLOCK_M, RANK_BLOCK), tl.float32)
    for k in range(0, K, BLOCK_K):
        inside = k + depth < K
        x = tl.load(x_ptrs, mask=row_mask & inside[None, :], other=0.0)
        if DROPOUT:
            x = tl.where(keep_entries(seeds, k + depth, threshold), x, 0.0)
        factor = tl.load(factor_ptrs, mask=rank_mask & inside[:, None], other=0.0)
        total = tl.dot(x, factor, total, input_precision=PRECISION)
        x_ptrs += BLOCK_K
        factor_ptrs += BLOCK_K * stride_depth
    total *= scale
    shrunk_ptrs = shrunk_ptr + row.to(tl.int64)[:, None] * RANK + rank[None, :]
    tl.store(shrunk_ptrs, total.to(shrunk_ptr.dtype.element_ty), mask=row_mask & rank_mask)


def _output(x: Tensor, factor: Tensor, transposed: bool) -> Tensor:
    return x.new_empty(x.shape[0], factor.shape[2 if transposed else 1])


@register(SCHEMA, lambda x, factor, *rest: _output(x, factor, rest[-1]))
def lora_shrink(
    x: Tensor,
    factor: Tensor,
    chunks: Tensor,
    scale: float,
    keys: Tensor | None,
    threshold: int,
    transposed: bool,
) -> Tensor:
    """[rows, rank]: scale drop(x) A_k^T.

    x [rows, K]; factor: lora_a [slots, rank, K] (transposed: lora_b [slots, K, rank]);
    chunks: `RowGroups.chunks(shrink_tile(x, rank).rows).rows`.
    """
    rank_dim, depth_dim = (2, 1) if transposed else (1, 2)
    rank = factor.shape[rank_dim]
    tile = shrink_tile(x, rank)
    shrunk = _output(x, factor, transposed)
    launch(
        lora_shrink_kernel,
        (chunks.shape[0],),
        x,
        factor,
        shrunk,
        chunks,
        keys,
        factor.stride(0),
        factor.stride(rank_dim),
        factor.stride(depth_dim),
        scale,
        threshold,
        K=x.shape[1],
        BLOCK_M=tile.rows,
        BLOCK_K=tile.depth,
        DROPOUT=keys is not None,
        **low_rank_options(x, rank),
        **tile.options,
    )
    return shrunk
