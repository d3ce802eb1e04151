"""Which rows, groups and slots are a kernel program's: int32 tables made on the host, and pieces of bank rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

Table = NDArray[np.int32]

MAX_ROWS = 400_000_000
"""Kernels count rows, and the entries of a table of at most five a row, in 32 bits."""


@dataclass(frozen=True)
class Chunks:
    """Pieces of groups: each holds at most a fixed number of rows of one group, counted from its start.

    rows: int32 [chunks, 5] of (first row, end row, slot, group, the group's first row).
    groups: int32 [filled groups, 4] of (slot, group, first chunk, end chunk).
    """

    rows: Tensor
    groups: Tensor


def filled_groups(sizes: Sequence[int], slots: Sequence[int]) -> Table:
    """int32 [filled groups, 4] of (first row, end row, slot, group) of each group that has rows."""
    counts = np.asarray(sizes, dtype=np.int64)
    groups = np.flatnonzero(counts)
    ends = counts.cumsum()[groups]
    return _table(ends - counts[groups], ends, np.asarray(slots, dtype=np.int64)[groups], groups)


def chunk_tables(filled: Table, length: int) -> tuple[Table, Table]:
    """`Chunks.rows` and `Chunks.groups` of chunks of `length` rows; the last of a group may be shorter."""
    starts, group_ends, slots, groups = filled.T
    pieces = -(-(group_ends - starts) // length)
    ends = pieces.cumsum()
    owner = np.repeat(np.arange(len(filled)), pieces)
    first = starts[owner] + (np.arange(len(owner)) - (ends - pieces)[owner]) * length
    last = np.minimum(first + length, group_ends[owner])
    return (
        _table(first, last, slots[owner], groups[owner], starts[owner]),
        _table(slots, groups, ends - pieces, ends),
    )


def span_table(filled: Table, rows: int, length: int) -> Table:
    """The groups that touch each tile when all rows are cut into tiles of `length`, whatever group they belong to.

    Returns int32 [tiles, 2]: the first and the end index into `filled`.
    """
    tile_start = np.arange(0, rows, length)
    starts, ends = np.ascontiguousarray(filled.T[:2])
    first = np.searchsorted(ends, tile_start, side="right")
    end = np.searchsorted(starts, np.minimum(tile_start + length, rows))
    return _table(first, end)


def _table(*columns: NDArray[Any]) -> Table:
    return np.stack(columns, axis=1).astype(np.int32)


@triton.jit
def load_filled(filled_ptr, index):
    """(first row, end row, slot, group) of a group that has rows; see `filled_groups`.

    Here and below, what a kernel does not use is not loaded.
    """
    entry = filled_ptr + 4 * index
    return tl.load(entry), tl.load(entry + 1), tl.load(entry + 2).to(tl.int64), tl.load(entry + 3)


@triton.jit
def load_chunk(chunks_ptr, index):
    """(first row, end row, slot, group, the group's first row) of a chunk; see `Chunks.rows`."""
    entry = chunks_ptr + 5 * index
    first, end, slot = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2).to(tl.int64)
    return first, end, slot, tl.load(entry + 3), tl.load(entry + 4)


@triton.jit
def load_chunk_group(chunk_groups_ptr, index):
    """(slot, group, first chunk, end chunk) of a group that has rows; see `Chunks.groups`."""
    entry = chunk_groups_ptr + 4 * index
    return tl.load(entry).to(tl.int64), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)


@triton.jit
def load_span(spans_ptr, tile):
    """(first, end) index into the filled groups of those that touch a tile; see `span_table`."""
    entry = spans_ptr + 2 * tile
    return tl.load(entry), tl.load(entry + 1)


def piece_grid(rows: int, entries: int, block: int) -> tuple[int]:
    """The grid of a kernel that calls `bank_piece`: one program for `block` entries of one of `rows` bank rows.

    It has one dimension: in the others a GPU takes 65,535 programs, fewer than a large cohort has slots, or a large
    classifier pieces.
    """
    return (rows * triton.cdiv(entries, block),)


@triton.jit
def bank_piece(entries, BLOCK: tl.constexpr):
    """(number of the row, number of its piece, int64 [BLOCK] offsets in the row) of this program."""
    pieces = tl.cdiv(entries, BLOCK)
    program = tl.program_id(0)
    piece = program % pieces
    return program // pieces, piece, piece.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
