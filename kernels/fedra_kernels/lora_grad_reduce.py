"""Second half of the adapter gradients: add the chunks' fp32 partial sums into the gradient sinks.

A chunk of rows, counted from its group's start, has one writer for its partial sums, and a group's partials are
added in order: no atomics, and a client's gradient depends on its own rows alone.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .bank_pieces import bank_piece, piece_grid
from .dispatch import launch
from .row_tables_kernels import load_chunk_group

BLOCK = 1024


@triton.jit(do_not_specialize=["chunk_groups_ptr", "scales_ptr"])
def lora_grad_reduce_kernel(
    sink_ptr,
    partial_ptr,
    chunk_groups_ptr,
    scales_ptr,
    stride_slot,
    gain,
    entries,
    BLOCK: tl.constexpr,
    SCALED: tl.constexpr,
):
    """sink[slot] += gain * scale_k times the sum of a group's partials, in the order of its chunks."""
    number, piece, _ = bank_piece(entries, BLOCK)
    # In 32 bits, which hold the entries of any factor: sm_100 would spill.
    offset = piece * BLOCK + tl.arange(0, BLOCK)
    slot, group, first, end = load_chunk_group(chunk_groups_ptr, number)
    mask = offset < entries
    total = tl.zeros((BLOCK,), tl.float32)
    partial_ptrs = partial_ptr + first.to(tl.int64) * entries + offset
    for _ in range(first, end):
        total += tl.load(partial_ptrs, mask=mask, other=0.0)
        partial_ptrs += entries
    if SCALED:
        total *= tl.load(scales_ptr + group) * gain
    sink_ptrs = sink_ptr + slot * stride_slot + offset
    previous = tl.load(sink_ptrs, mask=mask, other=0.0).to(tl.float32)
    tl.store(sink_ptrs, (previous + total).to(sink_ptr.dtype.element_ty), mask=mask)


def add_partials(sink: Tensor, partial: Tensor, chunk_groups: Tensor, scales: Tensor | None, gain: float) -> None:
    entries = partial.shape[1]
    launch(
        lora_grad_reduce_kernel,
        piece_grid(chunk_groups.shape[0], entries, BLOCK),
        sink,
        partial,
        chunk_groups,
        scales,
        sink.stride(0),
        gain,
        entries,
        BLOCK=BLOCK,
        SCALED=scales is not None,
        num_warps=4,
    )
