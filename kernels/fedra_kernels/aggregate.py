"""Streaming weighted mean of adapter slots into the global adapter of each block."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._kernels.checks import FLOAT_DTYPES, check_bank, check_device, check_dtype, check_index, check_like, check_shape
from ._kernels.row_tables import bank_piece, piece_grid
from .dispatch import in_place, launch, register, use_triton
from .groups import bank_rows, slot_chunks

SCHEMA = (
    "aggregate_(Tensor(a!) numerator, Tensor(b!) denominator, Tensor values, Tensor slots, Tensor starts, "
    "Tensor weights) -> ()"
)
BLOCK = 1024


def aggregate(
    numerator: Tensor, denominator: Tensor, values: Tensor, slots: Tensor, blocks: Tensor, weights: Tensor
) -> None:
    """numerator[b] += sum of w_i values[slots_i], denominator[b] += sum of w_i, over the i with blocks_i = b.

    Inside a block the order of addition is the order given. Blocks that nobody holds stay untouched.

    Args:
        numerator: [blocks, P], fp32 or fp64; updated in place. It is what sums are kept in.
        denominator: [blocks], dtype of numerator; updated in place.
        values: [slots, P], the bank, of any float dtype on every device.
        slots: int64 [n], bank rows; blocks: int64 [n], the block of each. On a GPU their values are not
            checked: a pair outside the tensors is left out.
        weights: [n], dtype of numerator.

    Raises:
        ValueError: a shape, dtype, device, slot or block does not fit.
    """
    _check_sums(numerator, denominator)
    check_shape("values", values, (None, numerator.shape[1]))
    check_dtype("values", values, FLOAT_DTYPES)
    check_device("values", values, "numerator", numerator)
    for name, bank in (("numerator", numerator), ("values", values)):
        check_bank(name, bank)
    check_index("slots", slots, "values", values)
    check_index("blocks", blocks, "numerator", numerator)
    for name, table in (("blocks", blocks), ("weights", weights)):
        check_shape(name, table, slots.shape)
    check_like("weights", weights, "numerator", numerator)
    if use_triton(values):
        # Compressed rows: the stable sort keeps the given order inside a block.
        sorted_blocks, order = torch.sort(blocks, stable=True)
        borders = torch.arange(numerator.shape[0] + 1, device=blocks.device)
        starts = torch.searchsorted(sorted_blocks, borders)
        aggregate_rows(numerator, denominator, values, slots[order], starts, weights[order])
        return
    denominator.index_add_(0, blocks, weights)
    _add_rows(numerator, values, slots, blocks, weights)


def finish_aggregate(numerator: Tensor, denominator: Tensor, previous: Tensor) -> Tensor:
    """numerator / denominator, and `previous` where the denominator is 0: [blocks, P], dtype of previous.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    _check_sums(numerator, denominator)
    check_shape("previous", previous, numerator.shape)
    check_dtype("previous", previous, FLOAT_DTYPES)
    check_device("previous", previous, "numerator", numerator)
    held = (denominator != 0)[:, None]
    mean = numerator / torch.where(held, denominator[:, None], 1.0)
    return torch.where(held, mean.to(previous.dtype), previous)


def _add_rows(numerator: Tensor, values: Tensor, slots: Tensor, blocks: Tensor, weights: Tensor) -> None:
    """The torch path of `aggregate`, a few slots at a time.

    Converted in the cache and added: adding floats to doubles takes torch, and NumPy, twice as long.
    """
    plain = bool((weights == 1).all())
    for rows, index in slot_chunks(slots, values.shape[1]):
        added = bank_rows(values, index).to(numerator.dtype)
        numerator.index_add_(0, blocks[rows], added if plain else added * weights[rows, None])


def _check_sums(numerator: Tensor, denominator: Tensor) -> None:
    check_shape("numerator", numerator, (None, None))
    check_dtype("numerator", numerator, (torch.float32, torch.float64))
    check_shape("denominator", denominator, (numerator.shape[0],))
    check_like("denominator", denominator, "numerator", numerator)


def aggregate_reference(
    numerator: Tensor, denominator: Tensor, values: Tensor, slots: Tensor, blocks: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """The new numerator and denominator, slot by slot in plain torch."""
    numerator, denominator = numerator.clone(), denominator.clone()
    for slot, block, weight in zip(slots.tolist(), blocks.tolist(), weights, strict=True):
        numerator[block] += weight * values[slot].to(numerator.dtype)
        denominator[block] += weight
    return numerator, denominator


@triton.jit(do_not_specialize=["slots_ptr", "starts_ptr", "weights_ptr", "slot_count"])
def aggregate_kernel(
    numerator_ptr,
    denominator_ptr,
    values_ptr,
    slots_ptr,
    starts_ptr,
    weights_ptr,
    slot_count,
    stride_block,
    stride_slot,
    entries,
    BLOCK: tl.constexpr,
):
    """One program adds one piece of a block's holders, in their order."""
    block, piece, offset = bank_piece(entries, BLOCK)
    block = block.to(tl.int64)
    first = tl.load(starts_ptr + block)
    end = tl.load(starts_ptr + block + 1)
    mask = offset < entries
    total = tl.zeros((BLOCK,), numerator_ptr.dtype.element_ty)
    weight_sum = tl.sum(tl.zeros((1,), numerator_ptr.dtype.element_ty), axis=0)
    for holder in range(first, end):
        slot = tl.load(slots_ptr + holder)
        known = (slot >= 0) & (slot < slot_count)
        weight = tl.load(weights_ptr + holder, mask=known, other=0.0)
        values = tl.load(values_ptr + slot * stride_slot + offset, mask=mask & known, other=0.0)
        total += weight * values.to(numerator_ptr.dtype.element_ty)
        weight_sum += weight
    if end > first:
        numerator_ptrs = numerator_ptr + block * stride_block + offset
        tl.store(numerator_ptrs, tl.load(numerator_ptrs, mask=mask, other=0.0) + total, mask=mask)
        if piece == 0:
            tl.store(denominator_ptr + block, tl.load(denominator_ptr + block) + weight_sum)


@register(SCHEMA, in_place)
def aggregate_rows(
    numerator: Tensor, denominator: Tensor, values: Tensor, slots: Tensor, starts: Tensor, weights: Tensor
) -> None:
    """`aggregate` with slots and weights sorted by block; starts int64 [blocks + 1] says where each begins."""
    launch(
        aggregate_kernel,
        piece_grid(numerator.shape[0], values.shape[1], BLOCK),
        numerator,
        denominator,
        values,
        slots,
        starts,
        weights,
        values.shape[0],
        numerator.stride(0),
        values.stride(0),
        values.shape[1],
        BLOCK=BLOCK,
        num_warps=4,
        num_stages=4,
    )
