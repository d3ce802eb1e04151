"""Rows of the tables of `row_tables`, as kernels read them. What a kernel does not use is not loaded."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_filled(filled_ptr, index):
    """(first row, end row, slot, group) of a group that has rows; see `filled_groups`."""
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
