"""Streaming weighted mean of adapter slots into the global adapter of each block."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import FLOAT_DTYPES, check_device, check_dtype, check_index, check_like, check_shape
from .groups import slot_chunks


def aggregate(
    numerator: Tensor, denominator: Tensor, values: Tensor, slots: Tensor, blocks: Tensor, weights: Tensor
) -> None:
    """numerator[b] += sum of w_i values[slots_i] and denominator[b] += sum of w_i, over the i with blocks_i = b.

    Inside a block the order of addition is the order given. Blocks that nobody holds stay untouched.

    Args:
        numerator: [blocks, P], fp64 on a CPU, fp32 on a GPU; updated in place.
        denominator: [blocks], dtype of numerator; updated in place.
        values: [slots, P], the bank.
        slots: int64 [n], bank rows; blocks: int64 [n], the block of each.
        weights: [n], dtype of numerator.

    Raises:
        ValueError: a shape, dtype, device, slot or block does not fit.
    """
    check_shape("numerator", numerator, (None, None))
    check_dtype("numerator", numerator, (torch.float32, torch.float64))
    check_shape("denominator", denominator, (numerator.shape[0],))
    check_shape("values", values, (None, numerator.shape[1]))
    check_dtype("values", values, FLOAT_DTYPES)
    check_device("values", values, "numerator", numerator)
    check_index("slots", slots, "values", values)
    check_index("blocks", blocks, "numerator", numerator)
    for name, table in (("blocks", blocks), ("weights", weights)):
        check_shape(name, table, slots.shape)
    for name, tensor in (("denominator", denominator), ("weights", weights)):
        check_like(name, tensor, "numerator", numerator)
    denominator.index_add_(0, blocks, weights)
    for rows, index in slot_chunks(slots, values.shape[1]):
        chunk = values[index].to(numerator.dtype, copy=True).mul_(weights[rows, None])
        numerator.index_add_(0, blocks[rows], chunk)


def finish_aggregate(numerator: Tensor, denominator: Tensor, previous: Tensor) -> Tensor:
    """numerator / denominator, and `previous` where the denominator is 0: [blocks, P], dtype of previous."""
    check_shape("numerator", numerator, (None, None))
    check_shape("denominator", denominator, (numerator.shape[0],))
    check_shape("previous", previous, numerator.shape)
    held = (denominator != 0)[:, None]
    mean = numerator / torch.where(held, denominator[:, None], 1.0)
    return torch.where(held, mean.to(previous.dtype), previous)


def aggregate_reference(
    numerator: Tensor, denominator: Tensor, values: Tensor, slots: Tensor, blocks: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """The new numerator and denominator, slot by slot in plain torch."""
    numerator, denominator = numerator.clone(), denominator.clone()
    for slot, block, weight in zip(slots.tolist(), blocks.tolist(), weights, strict=True):
        numerator[block] += weight * values[slot].to(numerator.dtype)
        denominator[block] += weight
    return numerator, denominator
