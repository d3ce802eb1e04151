"""An activation, GELU or SwiGLU, which also multiplies its rows by the A of the layer that reads them."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import launch, register
from .configs import ConfigTable, Tile, choose, low_rank_options
from .counter_hash import keep_entries, row_seeds
from .row_tables import load_chunk

SCHEMA = (
    "activation_forward(str kind, Tensor x, Tensor? up, Tensor? lora_a, Tensor? chunks, Tensor? keys, "
    "int threshold) -> Tensor[]"
)

CONFIGS: ConfigTable = {
    "sm_80": {"narrow": Tile(64, 64, 1, 8, 2), "float": Tile(32, 32, 1, 4, 2)},
    "sm_90": {"narrow": Tile(64, 64, 1, 8, 3), "float": Tile(32, 32, 1, 4, 2)},
    "sm_100": {"narrow": Tile(64, 64, 1, 8, 3), "float": Tile(32, 32, 1, 4, 2)},
    "gfx942": {"narrow": Tile(64, 64, 1, 8, 2), "float": Tile(32, 32, 1, 4, 2)},
    "small": {"narrow": Tile(64, 64, 1, 8, 2), "float": Tile(32, 32, 1, 4, 2)},
    "interpreter": dict.fromkeys(("narrow", "float"), Tile(16, 32, 1, 4, 1)),
}


def activation_tile(x: Tensor, lora_a: Tensor | None) -> Tile:
    """The tile of `activation_forward`."""
    return choose(CONFIGS, x, 1 if lora_a is None else lora_a.shape[1])


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x))."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def activate(x, up, KIND: tl.constexpr):
    """The activation of x, times `up` for SwiGLU."""
    if KIND == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        # 1 + tanh(z) is 2 sigmoid(2 z), without the cancellation.
        return x * sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        return x * sigmoid(x) * up


@triton.jit(do_not_specialize=["chunks_ptr", "keys_ptr", "rows"])
def activation_forward_kernel(
    x_ptr,
    up_ptr,
    y_ptr,
    lora_a_ptr,
    shrunk_ptr,
    chunks_ptr,
    keys_ptr,
    rows,
    stride_row,
    stride_slot,
    threshold,
    D: tl.constexpr,
    RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KIND: tl.constexpr,
    SHRINK: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program makes y, and S where asked for, of one block of rows."""
    program = tl.program_id(0)
    if SHRINK:
        first, end, slot, group, group_start = load_chunk(chunks_ptr, program)
        factor_ptr = lora_a_ptr + slot * stride_slot
    else:
        first = program.to(tl.int64) * BLOCK_M
        end = rows
    row = first + tl.arange(0, BLOCK_M)
    row_mask = (row < end)[:, None]
    if DROPOUT:
        seeds = row_seeds(keys_ptr, group, row - group_start)
    rank = tl.arange(0, RANK_BLOCK)
    rank_mask = (rank < RANK)[None, :]
    total = tl.zeros((BLOCK_M, RANK_BLOCK), tl.float32)
    for d in range(0, D, BLOCK_D):
        column = d + tl.arange(0, BLOCK_D)
        mask = row_mask & (column < D)[None, :]
        source = row.to(tl.int64)[:, None] * stride_row + column[None, :]
        x = tl.load(x_ptr + source, mask=mask, other=0.0).to(tl.float32)
        up = x
        if KIND == "swiglu":
            up = tl.load(up_ptr + source, mask=mask, other=0.0).to(tl.float32)
        y = activate(x, up, KIND).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + row.to(tl.int64)[:, None] * D + column[None, :], y, mask=mask)
        if SHRINK:
            factor_mask = rank_mask & (column < D)[:, None]
            factor = tl.load(factor_ptr + rank[None, :] * D + column[:, None], mask=factor_mask, other=0.0)
            if DROPOUT:
                y = tl.where(keep_entries(seeds, column, threshold), y, 0.0)
            total = tl.dot(y, factor, total, input_precision=PRECISION)
    if SHRINK:
        shrunk_ptrs = shrunk_ptr + row.to(tl.int64)[:, None] * RANK + rank[None, :]
        tl.store(shrunk_ptrs, total.to(shrunk_ptr.dtype.element_ty), mask=row_mask & rank_mask)


def _outputs(x: Tensor, lora_a: Tensor | None) -> list[Tensor]:
    y = x.new_empty(x.shape)
    return [y] if lora_a is None else [y, x.new_empty(x.shape[0], lora_a.shape[1])]


@register(SCHEMA, lambda kind, x, up, lora_a, *_: _outputs(x, lora_a))
def activation_forward(
    kind: str,
    x: Tensor,
    up: Tensor | None,
    lora_a: Tensor | None,
    chunks: Tensor | None,
    keys: Tensor | None,
    threshold: int,
) -> list[Tensor]:
    """[y], and the shrink [rows, rank] with lora_a [slots, rank, D]; x, up [rows, D] of one row stride.

    chunks: `RowGroups.chunks(activation_tile(x, lora_a).rows).rows` with lora_a, else None.
    """
    tile = activation_tile(x, lora_a)
    outputs = _outputs(x, lora_a)
    rank = 1 if lora_a is None else lora_a.shape[1]
    launch(
        activation_forward_kernel,
        (triton.cdiv(x.shape[0], tile.rows) if chunks is None else chunks.shape[0],),
        x,
        up,
        outputs[0],
        lora_a,
        outputs[1] if lora_a is not None else None,
        chunks,
        keys,
        x.shape[0],
        x.stride(0),
        0 if lora_a is None else lora_a.stride(0),
        threshold,
        D=x.shape[1],
        BLOCK_M=tile.rows,
        BLOCK_D=tile.columns,
        KIND=kind,
        SHRINK=lora_a is not None,
        DROPOUT=keys is not None,
        **low_rank_options(x, rank),
        **tile.options,
    )
    return outputs
