"""How a tile of a product ends: LayerScale, the residual stream, and rows written where they belong."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .product_forms import Form
from .tile_loads import is_aligned


def output_descriptor(form: Form, y: Tensor, rows: int, index: Tensor | None) -> TensorDescriptor | None:
    """A descriptor that stores parts of tiles of y: where the tile asks for it, y is aligned and has these rows alone.

    A part is cut off where y ends; where the rows of a product end before y, it would overwrite what follows.
    """
    if not form.tile.descriptors or index is not None or y.shape[0] != rows or not is_aligned(y):
        return None
    return TensorDescriptor.from_tensor(y, [form.tile.rows, form.tile.columns // form.parts])


@triton.jit
def halves(block, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of the columns of a block."""
    return tl.split(tl.permute(tl.reshape(block, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def stream_row(index_ptr, row, rows, stream_rows):
    """(int64 row of the stream, whether there is one) for each compact row; without an index the row itself."""
    if index_ptr is None:
        return row.to(tl.int64), (row < rows) & (row < stream_rows)
    else:
        stream_row = tl.load(index_ptr + row, mask=row < rows, other=-1)
        return stream_row, (stream_row >= 0) & (stream_row < stream_rows)


@triton.jit
def store_tile(
    total, first_row, first_column, last_column, ending, N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr, DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """y[y_index] = residual[residual_index] + scale * (total + bias), for the rows and columns of a tile.

    Of rows outside the residual nothing is read, they count as 0; rows outside y are left out. Columns from
    `last_column` on are not the tile's. DESCRIPTOR: y is one, without an index.
    ending: (rows, y, y_index, rows of y, bias, scale, residual, residual_index, rows of the residual).
    """
    if PARTS > 1:
        left, right = halves(total, BLOCK_M, BLOCK_N)
        store_tile(left, first_row, first_column, last_column, ending, N, BLOCK_M, BLOCK_N // 2, PARTS // 2, DESCRIPTOR)
        store_tile(
            right, first_row, first_column + BLOCK_N // 2, last_column, ending, N,
            BLOCK_M, BLOCK_N // 2, PARTS // 2, DESCRIPTOR,
        )  # fmt: skip
    else:
        rows, y, y_index_ptr, y_rows, bias_ptr, scale_ptr, residual_ptr, residual_index_ptr, residual_rows = ending
        row, column = first_row + tl.arange(0, BLOCK_M), first_column + tl.arange(0, BLOCK_N)
        column_mask = column < last_column
        if bias_ptr is not None:
            total += tl.load(bias_ptr + column, mask=column_mask, other=0.0).to(tl.float32)[None, :]
        if scale_ptr is not None:
            total *= tl.load(scale_ptr + column, mask=column_mask, other=0.0).to(tl.float32)[None, :]
        if residual_ptr is not None:
            source, inside = stream_row(residual_index_ptr, row, rows, residual_rows)
            residual_ptrs = residual_ptr + source[:, None] * N + column[None, :]
            residual = tl.load(residual_ptrs, mask=inside[:, None] & column_mask[None, :], other=0.0)
            total += residual.to(tl.float32)
        if DESCRIPTOR:
            y.store([first_row, first_column], total.to(y.dtype))
        else:
            target, inside = stream_row(y_index_ptr, row, rows, y_rows)
            y_ptrs = y + target[:, None] * N + column[None, :]
            tl.store(y_ptrs, total.to(y.dtype.element_ty), mask=inside[:, None] & column_mask[None, :])
