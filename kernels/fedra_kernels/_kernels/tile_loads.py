"""Blocks of the large matrices: by tensor descriptor (the TMA unit of sm_90 and later) or by pointers."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .configs import Tile


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


def product_operands(tile: Tile, x: Tensor, weight: Tensor, transposed: bool) -> tuple[Any, Any, bool, bool]:
    """x [rows, K] and weight [N, K] (transposed: [K, N]) as `row_block` and `weight_block` read them.

    Behind them come TRANSPOSED and DESCRIPTORS of these. There are descriptors where the tile asks for them and the
    matrices have the 16-byte alignment they need.
    """
    column_major = is_column_major(weight)
    matrix = weight.T if column_major else weight
    flipped = transposed != column_major
    if not tile.descriptors or not all(_is_aligned(operand) for operand in (x, matrix)):
        return x, matrix, flipped, False
    block = [tile.depth, tile.columns] if flipped else [tile.columns, tile.depth]
    rows = TensorDescriptor.from_tensor(x, [tile.rows, tile.depth])
    return rows, TensorDescriptor.from_tensor(matrix, block), flipped, True


def _is_aligned(matrix: Tensor) -> bool:
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
    weight, first_column, k,
    N: tl.constexpr, K: tl.constexpr, TRANSPOSED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """[BLOCK_K, BLOCK_N] of W^T for a contiguous weight [N, K], or of a weight [K, N] where transposed."""
    if DESCRIPTORS:
        if TRANSPOSED:
            return weight.load([k, first_column])
        else:
            return weight.load([first_column, k]).T
    else:
        column = first_column + tl.arange(0, BLOCK_N)
        depth = k + tl.arange(0, BLOCK_K)
        mask = (column < N)[None, :]
        if K % BLOCK_K != 0:
            mask &= (depth < K)[:, None]
        if TRANSPOSED:
            offset = depth.to(tl.int64)[:, None] * N + column[None, :]
        else:
            offset = column.to(tl.int64)[None, :] * K + depth[:, None]
        return tl.load(weight + offset, mask=mask, other=0.0)
