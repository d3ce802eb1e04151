"""Blocks of the large matrices: by tensor descriptor (the TMA unit of sm_90 and later) or by pointers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .configs import MOST_LINEARS, Tile


def is_column_major(weight: Tensor) -> bool:
    """False for a contiguous matrix, True for the transpose of one.

    Raises:
        ValueError: it is neither.
    """
    if weight.is_contiguous():
        return False
    if weight.T.is_contiguous():
        return True
    raise ValueError(f"weight: found strides {list(weight.stride())}, expected rows or columns without gaps")


@dataclass(frozen=True)
class Operands:
    """x and weight of a product as `row_block` and `weight_block` read them.

    inputs: x in one to three pieces of columns, then None. depths: the columns of each, then 0.
    transposed, descriptors: TRANSPOSED and DESCRIPTORS of these functions.
    """

    inputs: Sequence[Any]
    depths: Sequence[int]
    weight: Any
    transposed: bool
    descriptors: bool


def product_operands(tile: Tile, x: Sequence[Tensor], weight: Tensor, transposed: bool) -> Operands:
    """The operands for x [rows, K] in pieces of columns, and weight [N, K] (transposed: [K, N]).

    There are descriptors where the tile asks for them and all matrices have the 16-byte alignment they need.
    """
    column_major = is_column_major(weight)
    matrix = weight.T if column_major else weight
    flipped = transposed != column_major
    descriptors = tile.descriptors and have_descriptors(x, weight)
    pieces: list[Any] = list(x)
    right: Any = matrix
    if descriptors:
        block = [tile.depth, tile.columns] if flipped else [tile.columns, tile.depth]
        pieces = [TensorDescriptor.from_tensor(piece, [tile.rows, tile.depth]) for piece in x]
        right = TensorDescriptor.from_tensor(matrix, block)
    missing = MOST_LINEARS - len(x)
    depths = [piece.shape[1] for piece in x] + [0] * missing
    return Operands([*pieces, *[None] * missing], depths, right, flipped, descriptors)


def have_descriptors(x: Sequence[Tensor], weight: Tensor) -> bool:
    """Whether the pieces of x and the weight have the 16-byte alignment that descriptors need."""
    return all(is_aligned(matrix) for matrix in (*x, weight.T if is_column_major(weight) else weight))


def is_aligned(matrix: Tensor) -> bool:
    """Whether a contiguous matrix has the 16-byte alignment that a descriptor needs."""
    row_bytes = matrix.shape[1] * matrix.element_size()
    return matrix.numel() > 0 and matrix.data_ptr() % 16 == 0 and row_bytes % 16 == 0


@triton.jit
def row_block(
    matrix, first_row, rows, k,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_K] of a contiguous [rows, K] matrix; zeros outside."""
    if DESCRIPTORS:
        return matrix.load([first_row, k])
    else:
        row = first_row + tl.arange(0, BLOCK_M)
        depth = k + tl.arange(0, BLOCK_K)
        mask = (row < rows)[:, None]
        if K % BLOCK_K != 0:
            mask &= (depth < K)[None, :]
        return tl.load(matrix + row.to(tl.int64)[:, None] * K + depth[None, :], mask=mask, other=0.0)


@triton.jit
def weight_block(
    weight, first_column, k, end,
    N: tl.constexpr, K: tl.constexpr, MASKED: tl.constexpr, TRANSPOSED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """[BLOCK_K, BLOCK_N] of W^T for a contiguous weight [N, K], or of a weight [K, N] where transposed.

    Zeros outside, and from row `end` of W^T on where MASKED; descriptors read on there, where x has zeros.
    """
    if DESCRIPTORS:
        if TRANSPOSED:
            return weight.load([k, first_column])
        else:
            return weight.load([first_column, k]).T
    else:
        column = first_column + tl.arange(0, BLOCK_N)
        depth = k + tl.arange(0, BLOCK_K)
        mask = (column < N)[None, :]
        if MASKED:
            mask &= (depth < end)[:, None]
        if TRANSPOSED:
            offset = depth.to(tl.int64)[:, None] * N + column[None, :]
        else:
            offset = column.to(tl.int64)[None, :] * K + depth[:, None]
        return tl.load(weight + offset, mask=mask, other=0.0)


@triton.jit
def add_product(
    total, x0, x1, x2, weight, first_row, first_column, rows,
    K0: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr, N: tl.constexpr,
    TRANSPOSED: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """total + x W^T for x in pieces of K0, K1 and K2 columns."""
    if DESCRIPTORS:
        # One loop for all pieces, which Triton can fuse with the one over tiles.
        BLOCKS0: tl.constexpr = (K0 + BLOCK_K - 1) // BLOCK_K
        BLOCKS1: tl.constexpr = (K1 + BLOCK_K - 1) // BLOCK_K
        BLOCKS2: tl.constexpr = (K2 + BLOCK_K - 1) // BLOCK_K
        for block in range(0, BLOCKS0 + BLOCKS1 + BLOCKS2):
            x, k, start = x0, block * BLOCK_K, 0
            if K1 > 0:
                behind = block - BLOCKS0
                if behind >= 0:
                    x, k, start = x1, behind * BLOCK_K, K0
            if K2 > 0:
                behind = block - BLOCKS0 - BLOCKS1
                if behind >= 0:
                    x, k, start = x2, behind * BLOCK_K, K0 + K1
            left = x.load([first_row, k])
            right = weight_block(
                weight, first_column, start + k, 0, N, 0, False, TRANSPOSED, BLOCK_N, BLOCK_K, DESCRIPTORS
            )
            total = tl.dot(left, right, total, input_precision=PRECISION)
    else:
        total = add_piece(
            total, x0, weight, first_row, first_column, rows, 0, K0, N, K0 + K1 + K2,
            TRANSPOSED, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        if K1 > 0:
            total = add_piece(
                total, x1, weight, first_row, first_column, rows, K0, K1, N, K0 + K1 + K2,
                TRANSPOSED, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        if K2 > 0:
            total = add_piece(
                total, x2, weight, first_row, first_column, rows, K0 + K1, K2, N, K0 + K1 + K2,
                TRANSPOSED, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
    return total


@triton.jit
def add_piece(
    total, x, weight, first_row, first_column, rows,
    START: tl.constexpr, DEPTH: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """total + x times the DEPTH rows of W^T from START on, which are x's columns; by pointers."""
    for k in range(0, DEPTH, BLOCK_K):
        left = row_block(x, first_row, rows, k, DEPTH, BLOCK_M, BLOCK_K, False)
        right = weight_block(
            weight, first_column, START + k, START + DEPTH,
            N, K, DEPTH % BLOCK_K != 0, TRANSPOSED, BLOCK_N, BLOCK_K, False,
        )  # fmt: skip
        total = tl.dot(left, right, total, input_precision=PRECISION)
    return total
