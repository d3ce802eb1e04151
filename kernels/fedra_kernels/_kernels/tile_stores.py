"""How a tile of a product ends: LayerScale, the residual stream, and rows written where they belong."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def stream_row(index_ptr, row, rows, stream_rows):
    """(int64 row of the stream, whether there is one) for each compact row; without an index the row itself."""
    if index_ptr is None:
        return row.to(tl.int64), (row < rows) & (row < stream_rows)
    else:
        stream_row = tl.load(index_ptr + row, mask=row < rows, other=-1)
        return stream_row, (stream_row >= 0) & (stream_row < stream_rows)


@triton.jit
def finish_tile(
    total, row, column, column_mask, rows, y_ptr, y_index_ptr, y_rows,
    bias_ptr, scale_ptr, residual_ptr, residual_index_ptr, residual_rows, N: tl.constexpr,
):  # fmt: skip
    """y[y_index] = residual[residual_index] + scale * (total + bias), for some rows and columns.

    Of rows outside the residual nothing is read, they count as 0; rows outside y are left out.
    """
    if bias_ptr is not None:
        total += tl.load(bias_ptr + column, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    if scale_ptr is not None:
        total *= tl.load(scale_ptr + column, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    if residual_ptr is not None:
        source, inside = stream_row(residual_index_ptr, row, rows, residual_rows)
        residual_ptrs = residual_ptr + source[:, None] * N + column[None, :]
        residual = tl.load(residual_ptrs, mask=inside[:, None] & column_mask[None, :], other=0.0)
        total += residual.to(tl.float32)
    target, inside = stream_row(y_index_ptr, row, rows, y_rows)
    y_ptrs = y_ptr + target[:, None] * N + column[None, :]
    tl.store(y_ptrs, total.to(y_ptr.dtype.element_ty), mask=inside[:, None] & column_mask[None, :])
