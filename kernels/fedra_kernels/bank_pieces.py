"""Bank rows cut into pieces of BLOCK entries, one program each, in a grid of one dimension.

A GPU takes 65,535 programs in a grid's other dimensions: fewer than a large cohort has slots, or a large
classifier pieces.
"""

from __future__ import annotations

import triton
import triton.language as tl


def piece_grid(rows: int, entries: int, block: int) -> tuple[int]:
    """The grid of a kernel that calls `bank_piece`, for `rows` bank rows of `entries` each."""
    return (rows * triton.cdiv(entries, block),)


@triton.jit
def bank_piece(entries, BLOCK: tl.constexpr):
    """(number of the row, number of its piece, int64 [BLOCK] offsets in the row) of this program."""
    pieces = tl.cdiv(entries, BLOCK)
    program = tl.program_id(0)
    piece = program % pieces
    return program // pieces, piece, piece.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
