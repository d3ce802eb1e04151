"""Gradients of the shrink and of B from one read of dY: dS = scale_k dY B_k and dB_k = scale_k dY^T S."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import ConfigTable, Tile, choose, rank_block
from .dispatch import dot_precision, launch, register
from .row_tables_kernels import load_chunk

SCHEMA = (
    "lora_grad_output(Tensor grad_y, Tensor lora_b, Tensor shrunk, Tensor chunks, Tensor scales, float gain) "
    "-> (Tensor, Tensor)"
)
# A chunk is one block of rows.
CONFIGS: ConfigTable = {
    "sm_80": {"narrow": Tile(256, 64, 1, 8, 2), "float": Tile(64, 32, 1, 4, 2)},
    "sm_90": {"narrow": Tile(256, 64, 1, 8, 3), "float": Tile(64, 32, 1, 4, 2)},
    "sm_100": {"narrow": Tile(256, 64, 1, 8, 3), "float": Tile(64, 32, 1, 4, 2)},
    "gfx942": {"narrow": Tile(128, 64, 1, 8, 2), "float": Tile(64, 32, 1, 4, 2)},
    "small": {"narrow": Tile(128, 64, 1, 8, 2), "float": Tile(64, 32, 1, 4, 2)},
    "interpreter": dict.fromkeys(("narrow", "float"), Tile(32, 32, 1, 4, 1)),
}


def output_chunk(grad_y: Tensor, rank: int) -> int:
    """Rows of a chunk of `lora_grad_output`."""
    return choose(CONFIGS, grad_y, rank).rows


@triton.jit(do_not_specialize=["chunks_ptr", "scales_ptr"])
def lora_grad_output_kernel(
    grad_y_ptr,
    lora_b_ptr,
    shrunk_ptr,
    grad_shrunk_ptr,
    partial_ptr,
    chunks_ptr,
    scales_ptr,
    stride_slot,
    gain,
    N: tl.constexpr,
    RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dS = gain * scale_k dY B_k, and this chunk's dY^T S."""
    program = tl.program_id(0)
    first, end, slot, group, _ = load_chunk(chunks_ptr, program)
    scale = tl.load(scales_ptr + group) * gain
    row = first + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    rank = tl.arange(0, RANK_BLOCK)
    row_mask = (row < end)[:, None]
    rank_mask = (rank < RANK)[None, :]
    row_offset = row.to(tl.int64)[:, None]
    shrunk = tl.load(shrunk_ptr + row_offset * RANK + rank[None, :], mask=row_mask & rank_mask, other=0.0)
    grad_y_ptrs = grad_y_ptr + row_offset * N + column[None, :]
    factor_offset = column[:, None] * RANK + rank[None, :]
    factor_ptrs = lora_b_ptr + slot * stride_slot + factor_offset
    partial_ptrs = partial_ptr + program.to(tl.int64) * (N * RANK) + factor_offset
    grad_shrunk = tl.zeros((BLOCK_M, RANK_BLOCK), tl.float32)
    for n in range(0, N, BLOCK_N):
        inside = n + column < N
        factor_mask = inside[:, None] & rank_mask
        grad_y = tl.load(grad_y_ptrs, mask=row_mask & inside[None, :], other=0.0)
        factor = tl.load(factor_ptrs, mask=factor_mask, other=0.0)
        grad_shrunk = tl.dot(grad_y, factor, grad_shrunk, input_precision=PRECISION)
        partial = tl.dot(tl.trans(grad_y), shrunk, input_precision=PRECISION)
        tl.store(partial_ptrs, partial, mask=factor_mask)
        grad_y_ptrs += BLOCK_N
        factor_ptrs += BLOCK_N * RANK
        partial_ptrs += BLOCK_N * RANK
    grad_shrunk_ptrs = grad_shrunk_ptr + row_offset * RANK + rank[None, :]
    grad_shrunk = (grad_shrunk * scale).to(grad_shrunk_ptr.dtype.element_ty)
    tl.store(grad_shrunk_ptrs, grad_shrunk, mask=row_mask & rank_mask)


def _fake(
    grad_y: Tensor, lora_b: Tensor, shrunk: Tensor, chunks: Tensor, scales: Tensor, gain: float
) -> tuple[Tensor, Tensor]:
    entries = lora_b.shape[1] * lora_b.shape[2]
    return shrunk.new_empty(shrunk.shape), grad_y.new_empty(chunks.shape[0], entries, dtype=torch.float32)


@register(SCHEMA, _fake)
def lora_grad_output(
    grad_y: Tensor, lora_b: Tensor, shrunk: Tensor, chunks: Tensor, scales: Tensor, gain: float
) -> tuple[Tensor, Tensor]:
    """dS [rows, rank] of grad_y [rows, out], and the chunks' partial sums of dY^T S, fp32 [chunks, out * rank].

    For ranks up to NARROW_RANK. shrunk [rows, rank]; chunks: `RowGroups.chunks(output_chunk(grad_y, rank)).rows`.
    """
    outputs, rank = lora_b.shape[1:]
    tile = choose(CONFIGS, grad_y, rank)
    grad_shrunk, partial = _fake(grad_y, lora_b, shrunk, chunks, scales, gain)
    launch(
        lora_grad_output_kernel,
        (chunks.shape[0],),
        grad_y,
        lora_b,
        shrunk,
        grad_shrunk,
        partial,
        chunks,
        scales,
        lora_b.stride(0),
        gain,
        N=outputs,
        RANK=rank,
        RANK_BLOCK=rank_block(rank),
        BLOCK_M=tile.rows,
        BLOCK_N=tile.columns,
        PRECISION=dot_precision(grad_y),
        **tile.options,
    )
    return grad_shrunk, partial
