"""Device tables that tell a kernel's programs which rows, groups and slots are theirs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_ROWS = 400_000_000
"""Kernels count rows, and the entries of a table of at most five a row, in 32 bits."""


@dataclass(frozen=True)
class Chunks:
    """Pieces of groups: each holds at most a fixed number of rows of one group, counted from its start.

    rows: int32 [chunks, 5] of (first row, end row, slot, group, the group's first row).
    groups: int32 [filled groups, 4] of (slot, group, first chunk, end chunk).
    """

    rows: Tensor
    groups: Tensor


def build_filled(sizes: Sequence[int], slots: Sequence[int]) -> Tensor:
    """int64 [filled groups, 4] of (first row, end row, slot, group), on the host.

    Raises:
        ValueError: there are more than MAX_ROWS rows.
    """
    if sum(sizes) > MAX_ROWS:
        raise ValueError(f"sizes: found {sum(sizes)} rows together, expected at most {MAX_ROWS}")
    filled = [(size, slot, group) for group, (size, slot) in enumerate(zip(sizes, slots, strict=True)) if size]
    counts, filled_slots, groups = torch.tensor(filled, dtype=torch.int64).view(-1, 3).unbind(1)
    ends = counts.cumsum(0)
    return torch.stack((ends - counts, ends, filled_slots, groups), dim=1)


def build_chunks(filled: Tensor, sizes: Sequence[int], length: int, device: torch.device) -> Chunks:
    """Cut every non-empty group into chunks of `length` rows; the last may be shorter."""
    starts, group_ends, slots, groups = filled.unbind(1)
    counts = group_ends - starts
    pieces = (counts + (length - 1)) // length
    ends = pieces.cumsum(0)
    total = sum(-(-size // length) for size in sizes)
    owner = torch.repeat_interleave(torch.arange(len(counts)), pieces, output_size=total)
    number = torch.arange(total) - (ends - pieces)[owner]
    group_start = starts[owner]
    first = group_start + number * length
    last = torch.minimum(first + length, group_ends[owner])
    rows = torch.stack((first, last, slots[owner], groups[owner], group_start), dim=1)
    table = torch.stack((slots, groups, ends - pieces, ends), dim=1)
    return Chunks(to_device(rows, device), to_device(table, device))


def build_spans(filled: Tensor, rows: int, length: int, device: torch.device) -> Tensor:
    """Cut all rows into tiles of `length`, whatever group they belong to; the last may be shorter.

    Returns int32 [tiles, 2]: the first and the end index into `filled` of the groups that touch each tile.
    """
    tile_start = torch.arange(0, rows, length)
    first = torch.searchsorted(filled[:, 1].contiguous(), tile_start, right=True)
    end = torch.searchsorted(filled[:, 0].contiguous(), torch.clamp(tile_start + length, max=rows))
    return to_device(torch.stack((first, end), dim=1), device)


def to_device(table: Tensor, device: torch.device) -> Tensor:
    """The table as int32 on the device, without waiting for its queue."""
    table = table.to(torch.int32)
    if device.type != "cuda":
        return table.to(device)
    return table.pin_memory().to(device, non_blocking=True)
