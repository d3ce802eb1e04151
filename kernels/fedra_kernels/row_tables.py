"""Device tables that tell a kernel's programs which rows, groups and slots are theirs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Chunks:
    """Pieces of groups: each holds at most a fixed number of rows of one group, counted from its start.

    rows: int32 [chunks, 5] of (first row, end row, slot, group, the group's first row).
    groups: int32 [filled groups, 4] of (slot, group, first chunk, end chunk).
    """

    rows: Tensor
    groups: Tensor


@dataclass(frozen=True)
class Tiles:
    """A dense cut of the rows, whatever group they belong to.

    spans: int32 [tiles, 2], the first and the end index into `groups` of the groups that touch the tile.
    groups: int32 [filled groups, 4] of (first row, end row, slot, group).
    """

    spans: Tensor
    groups: Tensor


def build_chunks(sizes: Sequence[int], slots: Sequence[int], length: int, device: torch.device) -> Chunks:
    """Cut every non-empty group into chunks of `length` rows; the last may be shorter."""
    starts, counts, filled_slots, groups = _filled(sizes, slots)
    pieces = (counts + (length - 1)) // length
    ends = pieces.cumsum(0)
    total = sum(-(-size // length) for size in sizes)
    owner = torch.repeat_interleave(torch.arange(len(counts)), pieces, output_size=total)
    number = torch.arange(total) - (ends - pieces)[owner]
    group_start = starts[owner]
    first = group_start + number * length
    last = torch.minimum(first + length, group_start + counts[owner])
    rows = torch.stack((first, last, filled_slots[owner], groups[owner], group_start), dim=1)
    table = torch.stack((filled_slots, groups, ends - pieces, ends), dim=1)
    return Chunks(_to_device(rows, device), _to_device(table, device))


def build_tiles(sizes: Sequence[int], slots: Sequence[int], length: int, device: torch.device) -> Tiles:
    """Cut all rows into tiles of `length`; the last may be shorter."""
    starts, counts, filled_slots, groups = _filled(sizes, slots)
    ends = starts + counts
    rows = sum(sizes)
    tile_start = torch.arange(0, rows, length)
    first = torch.searchsorted(ends, tile_start, right=True)
    end = torch.searchsorted(starts, torch.clamp(tile_start + length, max=rows))
    table = torch.stack((starts, ends, filled_slots, groups), dim=1)
    return Tiles(_to_device(torch.stack((first, end), dim=1), device), _to_device(table, device))


def _filled(sizes: Sequence[int], slots: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """First row, rows, slot and number of every non-empty group: int64, on the host."""
    filled = [(size, slot, group) for group, (size, slot) in enumerate(zip(sizes, slots, strict=True)) if size]
    counts, filled_slots, groups = torch.tensor(filled, dtype=torch.int64).view(-1, 3).unbind(1)
    return counts.cumsum(0) - counts, counts, filled_slots, groups


def _to_device(table: Tensor, device: torch.device) -> Tensor:
    table = table.to(torch.int32)
    if device.type != "cuda":
        return table.to(device)
    # From pinned memory the copy does not wait for the queue.
    return table.pin_memory().to(device, non_blocking=True)
