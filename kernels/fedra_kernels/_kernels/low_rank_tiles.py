"""The grouped low-rank product of a tile: S of the rows of each group that touches it, times the group's factor."""

from __future__ import annotations

import triton
import triton.language as tl

from .counter_hash import keep_entries, row_seeds
from .row_tables import load_filled


@triton.jit
def add_expand(total, shrunk, own, factor, scale, SCALED: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """total + scale S E for the group's own rows of S and its factor E as [ranks, columns].

    The rows of other groups meet the factor as zeros times its entries: with an infinite entry of a client that
    diverged, they would turn to NaN. So the factor goes without its non-finite entries, and the client's own rows are
    made NaN. SPLIT: what rounding takes from scale S is multiplied as well.
    """
    wide = factor.to(tl.float32)
    finite = tl.abs(wide) < float("inf")
    broken = tl.max(tl.max(tl.where(finite, 0, 1), axis=1), axis=0) > 0
    factor = tl.where(finite, wide, 0.0).to(factor.dtype)
    shrunk = shrunk.to(tl.float32)
    if SCALED:
        shrunk *= scale
    shrunk = tl.where(own[:, None], tl.where(broken, float("nan"), shrunk), 0.0)
    rounded = shrunk.to(factor.dtype)
    total = tl.dot(rounded, factor, total, input_precision=PRECISION)
    if SPLIT:
        rest = (shrunk - rounded.to(tl.float32)).to(factor.dtype)
        total = tl.dot(rest, factor, total, input_precision=PRECISION)
    return total


@triton.jit
def load_factor(ptr, column, rank, stride_n, stride_r, width, RANK: tl.constexpr):
    """[ranks, columns] of a factor with `width` columns; zeros outside."""
    mask = (rank < RANK)[:, None] & (column < width)[None, :]
    return tl.load(ptr + column.to(tl.int64)[None, :] * stride_n + rank[:, None] * stride_r, mask=mask, other=0.0)


@triton.jit
def load_pieces(
    adapter, group_start, group_end, slot, piece, row, column,
    SHRUNK: tl.constexpr, RANK: tl.constexpr, RANK_STEP: tl.constexpr,
):  # fmt: skip
    """(which rows are the group's, its S as [rows, ranks], its factor as [ranks, columns]) of a piece of the rank.

    adapter: (S, the first column of S, whether there is an adapter, the factors, their width, the strides between
    slots, columns and ranks, and the scale).
    """
    shrunk_ptr, shrunk_column, adapted, expand_ptr, width, stride_slot, stride_n, stride_r, _ = adapter
    own = (row >= group_start) & (row < group_end) & adapted
    rank = piece * RANK_STEP + tl.arange(0, RANK_STEP)
    offset = row.to(tl.int64)[:, None] * SHRUNK + shrunk_column + rank[None, :]
    shrunk = tl.load(shrunk_ptr + offset, mask=own[:, None] & (rank < RANK)[None, :], other=0.0)
    return own, shrunk, load_factor(expand_ptr + slot * stride_slot, column, rank, stride_n, stride_r, width, RANK)


@triton.jit
def add_low_rank(
    total, adapter, groups, first_group, first_row, first_column,
    SHRUNK: tl.constexpr, RANK: tl.constexpr, RANK_STEP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SCALED: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """total + scale S E_k^T for a tile that `groups`, (filled groups, first, end), touch.

    first_group: (first row, end row, slot) of the first of them, read early: most tiles have no other.
    """
    PIECES: tl.constexpr = (RANK + RANK_STEP - 1) // RANK_STEP
    row, column = first_row + tl.arange(0, BLOCK_M), first_column + tl.arange(0, BLOCK_N)
    group_start, group_end, slot = first_group
    own, shrunk, factor = load_pieces(adapter, group_start, group_end, slot, 0, row, column, SHRUNK, RANK, RANK_STEP)
    total = add_expand(total, shrunk, own, factor, adapter[8], SCALED, SPLIT, PRECISION)
    filled_ptr, first, end = groups
    # Without the condition, which is the loop's own, Triton does not fuse the loops over tiles and depth.
    if first * PIECES + 1 < end * PIECES:
        for item in tl.range(first * PIECES + 1, end * PIECES, num_stages=1):
            group_start, group_end, slot, _ = load_filled(filled_ptr, item // PIECES)
            own, shrunk, factor = load_pieces(
                adapter, group_start, group_end, slot, item % PIECES, row, column, SHRUNK, RANK, RANK_STEP
            )
            total = add_expand(total, shrunk, own, factor, adapter[8], SCALED, SPLIT, PRECISION)
    return total


@triton.jit
def drop_entries(
    low, keys_ptr, threshold, groups, first_row, first_column, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """The low-rank product of a tile, with zeros where its input was dropped."""
    row, column = first_row + tl.arange(0, BLOCK_M), first_column + tl.arange(0, BLOCK_N)
    seeds = tl.zeros((BLOCK_M,), tl.uint32)
    filled_ptr, first, end = groups
    for index in tl.range(first, end, num_stages=1):
        group_start, group_end, _, group = load_filled(filled_ptr, index)
        own = (row >= group_start) & (row < group_end)
        seeds = tl.where(own, row_seeds(keys_ptr, group, row - group_start), seeds)
    return tl.where(keep_entries(seeds, column, threshold), low, 0.0)
