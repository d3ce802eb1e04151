"""Row groups: which rows of a compact matrix belong to which slot of an adapter bank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import torch
from torch import Tensor

from .row_tables import Chunks, build_chunks, build_filled, build_spans, to_device

SlotIndex = slice | Tensor
"""Rows of a bank: a slice where they are consecutive (a view), an index tensor otherwise (a copy)."""


@dataclass(frozen=True)
class Run:
    """Adjacent non-empty groups of one size: one batched product covers them."""

    rows: slice
    count: int
    size: int
    slots: SlotIndex
    scale: float | Tensor
    """One number where the groups share it, else a tensor [count, 1, 1]."""


class RowGroups:
    """Consecutive row ranges of a compact [rows, features] matrix, each owned by one slot of a bank.

    Args:
        sizes: rows of each group; may hold zeros. The sum is the number of rows.
        slots: int64 [groups], the bank row of each group; distinct.
        scales: [groups], LoRA alpha / rank of each group; fp32, or fp64 for fp64 banks.
        device: where the ops run; default: the device of `slots`. Give host tensors and a device when the
            tables are made on the host: a `slots` tensor that is already on a GPU is read back once.

    Raises:
        ValueError: lengths differ, a size or slot is negative, a slot repeats, or a dtype does not fit.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        slots: Tensor,
        scales: Tensor,
        device: torch.device | str | None = None,
    ) -> None:
        self.sizes = tuple(int(size) for size in sizes)
        if min(self.sizes, default=0) < 0:
            raise ValueError(f"sizes: found {min(self.sizes)}, expected sizes of at least 0")
        for name, table in (("slots", slots), ("scales", scales)):
            if table.shape != (len(self.sizes),):
                raise ValueError(f"{name}: found shape {list(table.shape)}, expected [{len(self.sizes)}] as sizes has")
        if slots.dtype != torch.int64:
            raise ValueError(f"slots: found dtype {slots.dtype}, expected torch.int64")
        if scales.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"scales: found dtype {scales.dtype}, expected torch.float32 or torch.float64")
        self.host_slots: tuple[int, ...] = tuple(slots.tolist())
        if min(self.host_slots, default=0) < 0:
            raise ValueError(f"slots: found {min(self.host_slots)}, expected slots of at least 0")
        if len(set(self.host_slots)) != len(self.host_slots):
            raise ValueError(f"slots: found a slot twice in {list(self.host_slots)}, expected distinct slots")
        target = slots.device if device is None else torch.device(device)
        self.slots = slots.to(target, non_blocking=True)
        self.scales = scales.contiguous().to(target, non_blocking=True)
        self._forget_tables()

    def _forget_tables(self) -> None:
        self._per_token: dict[int, RowGroups] = {}
        self._chunks: dict[int, Chunks] = {}
        self._spans: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def device(self) -> torch.device:
        return self.slots.device

    @cached_property
    def rows(self) -> int:
        """Rows of all groups together."""
        return sum(self.sizes)

    @cached_property
    def smallest_bank(self) -> int:
        """The number of slots a bank needs at least."""
        return max(self.host_slots, default=-1) + 1

    def per_token(self, tokens: int) -> RowGroups:
        """The groups when every row (a sample) becomes `tokens` rows."""
        if tokens < 1:
            raise ValueError(f"tokens: found {tokens}, expected at least 1")
        if tokens == 1:
            return self
        if tokens not in self._per_token:
            expanded = object.__new__(RowGroups)
            expanded.sizes = tuple(size * tokens for size in self.sizes)
            expanded.host_slots, expanded.slots, expanded.scales = self.host_slots, self.slots, self.scales
            expanded._forget_tables()
            self._per_token[tokens] = expanded
        return self._per_token[tokens]

    @cached_property
    def _host_filled(self) -> Tensor:
        return build_filled(self.sizes, self.host_slots)

    @cached_property
    def filled(self) -> Tensor:
        """int32 [filled groups, 4] of (first row, end row, slot, group) of each group that has rows."""
        return to_device(self._host_filled, self.device)

    def chunks(self, length: int) -> Chunks:
        """Chunks of at most `length` rows, none of which crosses a group's border."""
        if length not in self._chunks:
            self._chunks[length] = build_chunks(self._host_filled, self.sizes, length, self.device)
        return self._chunks[length]

    def spans(self, length: int) -> Tensor:
        """int32 [tiles, 2]: the range of `filled` that touches each tile of a dense cut into `length` rows."""
        if length not in self._spans:
            self._spans[length] = build_spans(self._host_filled, self.rows, length, self.device)
        return self._spans[length]

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """Runs of adjacent non-empty groups of equal size, for the batched products of the torch path."""
        filled = [group for group, size in enumerate(self.sizes) if size]
        scales: list[float] = self.scales.tolist()
        runs, start = [], 0
        for size, members in groupby(filled, key=self.sizes.__getitem__):
            groups = list(members)
            stop = start + size * len(groups)
            slots = slot_index([self.host_slots[group] for group in groups], self.device)
            run_scales = [scales[group] for group in groups]
            scale: float | Tensor = run_scales[0]
            if any(value != run_scales[0] for value in run_scales):
                scale = torch.tensor(run_scales, dtype=self.scales.dtype, device=self.device)[:, None, None]
            runs.append(Run(slice(start, stop), len(groups), size, slots, scale))
            start = stop
        return tuple(runs)

    @cached_property
    def row_group(self) -> Tensor:
        """int64 [rows]: the group of each row."""
        sizes = torch.tensor(self.sizes, dtype=torch.int64)
        return torch.repeat_interleave(torch.arange(len(self.sizes)), sizes).to(self.device)

    @cached_property
    def inverse_sizes(self) -> Tensor:
        """fp64 [groups]: 1 / size, and 1 for an empty group."""
        return (1.0 / torch.tensor(self.sizes, dtype=torch.float64).clamp_(min=1.0)).to(self.device)


def slot_index(slots: Sequence[int], device: torch.device) -> SlotIndex:
    """A slice where the slots are consecutive and ascending, else an index tensor."""
    if all(slot == slots[0] + offset for offset, slot in enumerate(slots)):
        return slice(slots[0], slots[0] + len(slots))
    return torch.tensor(slots, dtype=torch.int64, device=device)


def grouped(rows: Tensor, run: Run) -> Tensor:
    """The run's rows of a [rows, features] matrix as [groups, size, features], a view."""
    return rows[run.rows].view(run.count, run.size, rows.shape[1])


def bank_rows(bank: Tensor, slots: SlotIndex) -> Tensor:
    """The bank's rows `slots`: a view for a slice."""
    return bank[slots] if isinstance(slots, slice) else bank.index_select(0, slots)


def add_to_bank(sink: Tensor, slots: SlotIndex, values: Tensor) -> None:
    """sink[slots] += values, in place."""
    if isinstance(slots, slice):
        sink[slots].add_(values)
    else:
        sink.index_add_(0, slots, values.to(sink.dtype))


def slot_chunks(slots: Tensor, features: int, entries: int = 1 << 17) -> Iterator[tuple[slice, SlotIndex]]:
    """Cut [n] slots into pieces of about `entries` bank entries, which stay in a CPU's cache.

    Yields which of the n each piece covers and its bank rows; a piece of consecutive slots is a slice.
    """
    step = max(entries // max(features, 1), 1)
    numbers = slots.tolist()
    for start in range(0, len(numbers), step):
        rows = slice(start, min(start + step, len(numbers)))
        yield rows, slot_index(numbers[rows], slots.device)
