"""The chunks' partial sums of a factor's gradient, such as dA_k = dS^T drop(x): one writer each, fp32.

x may be given as the rows that a norm has read, with their moments: it is computed anew while they are read, so that it
need not be kept.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import in_place, launch, register
from .configs import ConfigTable, Tile, choose, low_rank_options
from .counter_hash import keep_entries, row_seeds
from .row_tables import load_chunk

SCHEMA = (
    "lora_grad_outer(Tensor wide, Tensor narrow, Tensor chunks, Tensor(a!) partials, int column, int first_rank, "
    "int rank, bool transposed, float scale, Tensor? keys=None, int threshold=0, Tensor? mean=None, "
    "Tensor? inverse=None, Tensor? weight=None, Tensor? bias=None) -> ()"
)

CONFIGS: ConfigTable = {
    "sm_80": {"narrow": Tile(64, 128, 1, 4, 4), "wide": Tile(64, 64, 1, 4, 3), "float": Tile(32, 64, 1, 4, 3)},
    "sm_90": {"narrow": Tile(64, 128, 1, 4, 4), "wide": Tile(64, 64, 1, 4, 4), "float": Tile(32, 64, 1, 4, 3)},
    "sm_100": {"narrow": Tile(64, 128, 1, 4, 4), "wide": Tile(64, 128, 1, 4, 3), "float": Tile(32, 64, 1, 4, 3)},
    "gfx942": {"narrow": Tile(64, 128, 1, 4, 2), "wide": Tile(32, 64, 1, 4, 2), "float": Tile(32, 64, 1, 4, 2)},
    "small": {"narrow": Tile(64, 128, 1, 8, 3), "wide": Tile(64, 64, 1, 4, 2), "float": Tile(32, 64, 1, 4, 2)},
    "interpreter": dict.fromkeys(("narrow", "wide", "float"), Tile(16, 32, 1, 4, 1)),
}


@triton.jit(do_not_specialize=["chunks_ptr", "keys_ptr"])
def lora_grad_outer_kernel(
    wide_ptr,
    narrow_ptr,
    partials_ptr,
    chunks_ptr,
    keys_ptr,
    mean_ptr,
    inverse_ptr,
    weight_ptr,
    bias_ptr,
    threshold,
    column,
    stride_chunk,
    stride_row,
    stride_column,
    stride_rank,
    scale,
    C: tl.constexpr,
    RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DROPOUT: tl.constexpr,
    NORMALIZED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """This chunk's scale * drop(wide)^T narrow, for one block of wide's columns."""
    chunk = tl.program_id(0)
    start, end, _, group, group_start = load_chunk(chunks_ptr, chunk)
    feature = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    rank = tl.arange(0, RANK_BLOCK)
    inside = feature < C
    rank_mask = rank < RANK
    total = tl.zeros((BLOCK_C, RANK_BLOCK), tl.float32)
    if NORMALIZED:
        weight = tl.load(weight_ptr + feature, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + feature, mask=inside, other=0.0).to(tl.float32)
    for first in range(start, end, BLOCK_M):
        row = first + tl.arange(0, BLOCK_M)
        row_mask = row < end
        row_offset = row.to(tl.int64)[:, None]
        wide = tl.load(
            wide_ptr + row_offset * C + feature[None, :], mask=row_mask[:, None] & inside[None, :], other=0.0
        )
        if NORMALIZED:
            mean = tl.load(mean_ptr + row, mask=row_mask, other=0.0)
            inverse = tl.load(inverse_ptr + row, mask=row_mask, other=0.0)
            values = (wide.to(tl.float32) - mean[:, None]) * inverse[:, None] * weight[None, :]
            if HAS_BIAS:
                values += bias[None, :]
            # Rows outside meet zeros of `narrow`, and their moments are zeros, too: what they hold is finite.
            wide = values.to(wide_ptr.dtype.element_ty)
        if DROPOUT:
            seeds = row_seeds(keys_ptr, group, row - group_start)
            wide = tl.where(keep_entries(seeds, feature, threshold), wide, 0.0)
        narrow_ptrs = narrow_ptr + row_offset * stride_row + rank[None, :]
        narrow = tl.load(narrow_ptrs, mask=row_mask[:, None] & rank_mask[None, :], other=0.0)
        total = tl.dot(tl.trans(wide), narrow, total, input_precision=PRECISION)
    partial_ptrs = partials_ptr + chunk.to(tl.int64) * stride_chunk + column
    partial_ptrs += feature[:, None] * stride_column + rank[None, :] * stride_rank
    tl.store(partial_ptrs, total * scale, mask=inside[:, None] & rank_mask[None, :])


@register(SCHEMA, in_place)
def lora_grad_outer(
    wide: Tensor,
    narrow: Tensor,
    chunks: Tensor,
    partials: Tensor,
    column: int,
    first_rank: int,
    rank: int,
    transposed: bool,
    scale: float,
    keys: Tensor | None = None,
    threshold: int = 0,
    mean: Tensor | None = None,
    inverse: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> None:
    """Write scale * drop(wide)^T narrow of each chunk into `partials` at `column`, as [C, rank] ([rank, C] transposed).

    Args:
        wide: [rows, C]; with `mean`, `inverse` (fp32 [rows]) and `weight`, `bias` ([C], bias may be None) the rows that
            a norm has read, and what is multiplied is their norm.
        narrow: [rows, ranks], of which the columns `first_rank` to `first_rank + rank` are used.
        chunks: `RowGroups.chunks(gradient_chunk(wide)).rows`.
        partials: fp32 [chunks, columns of a slot].
        keys, threshold: of dropout.
    """
    features = wide.shape[1]
    tile = choose(CONFIGS, wide, rank)
    stride_column, stride_rank = (1, features) if transposed else (rank, 1)
    launch(
        lora_grad_outer_kernel,
        (chunks.shape[0], triton.cdiv(features, tile.columns)),
        wide,
        narrow[:, first_rank:],
        partials,
        chunks,
        keys,
        mean,
        inverse,
        weight,
        bias,
        threshold,
        column,
        partials.stride(0),
        narrow.stride(0),
        stride_column,
        stride_rank,
        scale,
        C=features,
        BLOCK_M=tile.rows,
        BLOCK_C=tile.columns,
        DROPOUT=keys is not None,
        NORMALIZED=mean is not None,
        HAS_BIAS=bias is not None,
        **low_rank_options(wide, rank),
        **tile.options,
    )
