"""Second half of the adapter gradients: add the chunks' fp32 partial sums of dA and dB into the gradient sinks.

A chunk of rows, counted from its group's start, has one writer for its partial sums, and a group's partials are
added in order: no atomics, and a client's gradient depends on its own rows alone. Both factors share a launch.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .dispatch import in_place, launch, register
from .row_tables_kernels import load_chunk_group

SCHEMA = (
    "lora_grad_reduce(Tensor? partial_a, Tensor? groups_a, Tensor(a!)? grad_a, Tensor? partial_b, "
    "Tensor? groups_b, Tensor(b!)? grad_b, Tensor scales, float gain) -> ()"
)
BLOCK = 1024


@triton.jit
def _add_piece(
    grad_ptr, partial_ptr, groups_ptr, scales_ptr, stride_slot, number, piece, entries, gain,
    BLOCK: tl.constexpr, TRAINED: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """grad[slot] += the sum of a group's partials, in the order of its chunks, for one piece of a trained factor."""
    if TRAINED:
        slot, group, first, end = load_chunk_group(groups_ptr, number)
        # In 32 bits, which hold the entries of any factor: sm_100 would spill.
        offset = piece * BLOCK + tl.arange(0, BLOCK)
        mask = offset < entries
        total = tl.zeros((BLOCK,), tl.float32)
        partial_ptrs = partial_ptr + first.to(tl.int64) * entries + offset
        for _ in range(first, end):
            total += tl.load(partial_ptrs, mask=mask, other=0.0)
            partial_ptrs += entries
        if SCALED:
            total *= tl.load(scales_ptr + group) * gain
        grad_ptrs = grad_ptr + slot * stride_slot + offset
        previous = tl.load(grad_ptrs, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_ptrs, (previous + total).to(grad_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["groups_a_ptr", "groups_b_ptr", "scales_ptr"])
def lora_grad_reduce_kernel(
    partial_a_ptr,
    groups_a_ptr,
    grad_a_ptr,
    partial_b_ptr,
    groups_b_ptr,
    grad_b_ptr,
    scales_ptr,
    stride_a,
    stride_b,
    gain,
    entries_a,
    entries_b,
    BLOCK: tl.constexpr,
    HAS_A: tl.constexpr,
    HAS_B: tl.constexpr,
):
    """One program adds one piece of one factor of one group: the pieces of dA, then those of dB."""
    pieces_a = tl.cdiv(entries_a, BLOCK)
    pieces = pieces_a + tl.cdiv(entries_b, BLOCK)
    number = tl.program_id(0) // pieces
    piece = tl.program_id(0) % pieces
    if piece < pieces_a:
        _add_piece(
            grad_a_ptr, partial_a_ptr, groups_a_ptr, scales_ptr, stride_a, number, piece, entries_a, gain,
            BLOCK, HAS_A, False,
        )  # fmt: skip
    else:
        # dA has been made of scaled rows, dB has not.
        _add_piece(
            grad_b_ptr, partial_b_ptr, groups_b_ptr, scales_ptr, stride_b, number, piece - pieces_a, entries_b, gain,
            BLOCK, HAS_B, True,
        )  # fmt: skip


@register(SCHEMA, in_place)
def lora_grad_reduce(
    partial_a: Tensor | None,
    groups_a: Tensor | None,
    grad_a: Tensor | None,
    partial_b: Tensor | None,
    groups_b: Tensor | None,
    grad_b: Tensor | None,
    scales: Tensor,
    gain: float,
) -> None:
    """grad_a[slot] += a group's partials of dA; grad_b[slot] += gain * scale_k times its partials of dB.

    partial_a fp32 [chunks, rank * in], groups_a: `Chunks.groups` of these, grad_a [slots, rank, in]; likewise for B.
    Each factor's three are None where it is frozen.
    """
    groups = groups_a if groups_a is not None else groups_b
    if groups is None:
        return
    entries = [0 if partial is None else partial.shape[1] for partial in (partial_a, partial_b)]
    launch(
        lora_grad_reduce_kernel,
        (groups.shape[0] * sum(triton.cdiv(count, BLOCK) for count in entries),),
        partial_a,
        groups_a,
        grad_a,
        partial_b,
        groups_b,
        grad_b,
        scales,
        *(0 if sink is None else sink.stride(0) for sink in (grad_a, grad_b)),
        gain,
        *entries,
        BLOCK=BLOCK,
        HAS_A=partial_a is not None,
        HAS_B=partial_b is not None,
        num_warps=4,
    )
