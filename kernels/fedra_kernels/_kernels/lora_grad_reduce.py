"""The gradients of adapters from the partial sums of their chunks, added in order."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import in_place, launch, register
from .row_tables import load_chunk_group

SCHEMA = "lora_grad_reduce(Tensor partials, Tensor groups, Tensor(a!)? grad_a, Tensor(b!)? grad_b) -> ()"
BLOCK = 1024


@triton.jit
def _add_piece(
    grad_ptr, partials_ptr, groups_ptr, stride_slot, stride_chunk, number, piece, entries, BLOCK: tl.constexpr
):
    """grad[slot] += a group's partial sums, in their order, for one piece of a sink."""
    slot, _, first, end = load_chunk_group(groups_ptr, number)
    # In 32 bits, which hold the entries of any slot: sm_100 would spill.
    offset = piece * BLOCK + tl.arange(0, BLOCK)
    mask = offset < entries
    total = tl.zeros((BLOCK,), tl.float32)
    partial_ptrs = partials_ptr + first.to(tl.int64) * stride_chunk + offset
    for _ in range(first, end):
        total += tl.load(partial_ptrs, mask=mask, other=0.0)
        partial_ptrs += stride_chunk
    grad_ptrs = grad_ptr + slot * stride_slot + offset
    previous = tl.load(grad_ptrs, mask=mask, other=0.0).to(tl.float32)
    tl.store(grad_ptrs, (previous + total).to(grad_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["groups_ptr"])
def lora_grad_reduce_kernel(
    partials_ptr,
    groups_ptr,
    grad_a_ptr,
    grad_b_ptr,
    stride_a,
    stride_b,
    stride_chunk,
    entries_a,
    entries_b,
    BLOCK: tl.constexpr,
    HAS_A: tl.constexpr,
    HAS_B: tl.constexpr,
):
    """One program adds one piece of one sink of one group: the pieces of the first sink, then those of the second."""
    pieces_a = tl.cdiv(entries_a, BLOCK)
    pieces = pieces_a + tl.cdiv(entries_b, BLOCK)
    number = tl.program_id(0) // pieces
    piece = tl.program_id(0) % pieces
    if piece < pieces_a:
        if HAS_A:
            _add_piece(
                grad_a_ptr, partials_ptr, groups_ptr, stride_a, stride_chunk, number, piece, entries_a, BLOCK
            )  # fmt: skip
    else:
        if HAS_B:
            _add_piece(
                grad_b_ptr, partials_ptr + entries_a, groups_ptr, stride_b, stride_chunk, number, piece - pieces_a,
                entries_b, BLOCK,
            )  # fmt: skip


@register(SCHEMA, in_place)
def lora_grad_reduce(partials: Tensor, groups: Tensor, grad_a: Tensor | None, grad_b: Tensor | None) -> None:
    """Add each group's partial sums to its slot of the sinks.

    Args:
        partials: fp32 [chunks, columns]: the entries of a slot in `grad_a`, then those in `grad_b`.
        groups: `Chunks.groups` of the chunks.
        grad_a, grad_b: [slots, ...], contiguous behind the slots; None where there is none.
    """
    entries = [0 if sink is None else sink[0].numel() for sink in (grad_a, grad_b)]
    launch(
        lora_grad_reduce_kernel,
        (groups.shape[0] * sum(triton.cdiv(count, BLOCK) for count in entries),),
        partials,
        groups,
        grad_a,
        grad_b,
        *(0 if sink is None else sink.stride(0) for sink in (grad_a, grad_b)),
        partials.stride(0),
        *entries,
        BLOCK=BLOCK,
        HAS_A=grad_a is not None,
        HAS_B=grad_b is not None,
        num_warps=4,
    )
