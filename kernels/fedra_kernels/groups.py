"""Row groups: which rows of a compact matrix belong to which slot of an adapter bank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ._kernels.row_tables import MAX_ROWS, Chunks, Table, chunk_tables, filled_groups, span_table

_ALIGNMENT = 8
"""Bytes at multiples of which arrays of one copy begin: torch views bytes as a dtype only at multiples of its size."""

SlotIndex = slice | Tensor
"""Rows of a bank: a slice where they are consecutive (a view), an index tensor otherwise (a copy)."""


@dataclass(frozen=True)
class Run:
    """Adjacent non-empty groups of one size: one batched product covers them."""

    rows: slice
    count: int
    size: int
    slots: SlotIndex


TableKey = tuple[int, str, int]
"""Identifies a table of some groups: tokens per sample, name, length of its chunks or tiles."""
_ARRAYS = {"chunks": 2}
"""Arrays of the tables that have several."""


class RowGroups:
    """Consecutive row ranges of a compact [rows, features] matrix, each owned by one slot of a bank.

    Tables for the kernels are made on the host and copied to the device when they are first requested. `requested`
    collects their keys, so that groups which the same code will use can have these tables in one copy from the start
    (`host_tables`, `adopt_tables`).

    Args:
        sizes: rows of each group; may hold zeros. The sum, at most MAX_ROWS, is the number of rows.
        slots: int64 [groups], the bank row of each group; distinct.
        device: where the ops run; default: the device of `slots`. Give host tensors and a device: a `slots` tensor
            that is already on a GPU is read back once.
        requested: the set to which the keys of requested tables are added; several groups may share one.

    Raises:
        ValueError: lengths differ, a size or slot is negative, a slot repeats, there are too many rows, or a dtype
            does not fit.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        slots: Tensor,
        device: torch.device | str | None = None,
        requested: set[TableKey] | None = None,
    ) -> None:
        self.sizes = tuple(int(size) for size in sizes)
        if min(self.sizes, default=0) < 0:
            raise ValueError(f"sizes: found {min(self.sizes)}, expected sizes of at least 0")
        if slots.shape != (len(self.sizes),):
            raise ValueError(f"slots: found shape {list(slots.shape)}, expected [{len(self.sizes)}] as sizes has")
        if slots.dtype != torch.int64:
            raise ValueError(f"slots: found dtype {slots.dtype}, expected torch.int64")
        self.device = _with_index(slots.device if device is None else torch.device(device))
        self.host_slots: tuple[int, ...] = tuple(slots.tolist())
        if min(self.host_slots, default=0) < 0:
            raise ValueError(f"slots: found {min(self.host_slots)}, expected slots of at least 0")
        if len(set(self.host_slots)) != len(self.host_slots):
            raise ValueError(f"slots: found a slot twice in {list(self.host_slots)}, expected distinct slots")
        self._samples, self._tokens = self, 1
        self._per_token: dict[int, RowGroups] = {}
        self._with_first_tokens: dict[tuple[int, int], RowGroups] = {}
        self._tables: dict[TableKey, list[Tensor]] = {}
        self._requested = set() if requested is None else requested
        self._check_rows()

    def _check_rows(self) -> None:
        if self.rows > MAX_ROWS:
            raise ValueError(f"sizes: found {self.rows} rows together, expected at most {MAX_ROWS}")

    def __len__(self) -> int:
        return len(self.sizes)

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
            expanded.device, expanded.host_slots = self.device, self.host_slots
            expanded._samples, expanded._tokens = self._samples, self._tokens * tokens
            expanded._per_token, expanded._with_first_tokens = {}, {}
            expanded._check_rows()
            self._per_token[tokens] = expanded
        return self._per_token[tokens]

    @cached_property
    def filled_slots(self) -> SlotIndex:
        """The bank row of each group that has rows."""
        filled = [slot for slot, size in zip(self.host_slots, self.sizes, strict=True) if size]
        return slot_index(filled, self.device)

    @cached_property
    def compact(self) -> RowGroups:
        """The groups that have rows, of a bank that holds `filled_slots` alone, in their order."""
        sizes = [size for size in self.sizes if size]
        return RowGroups(sizes, torch.arange(len(sizes)), self.device)

    def with_first_tokens(self, groups: int, tokens: int) -> RowGroups:
        """`compact`, where each `tokens` rows of the last `groups` groups have become one; cached."""
        if not groups:
            return self.compact
        key = (groups, tokens)
        if key not in self._with_first_tokens:
            first = len(self) - groups
            sizes = [size if group < first else size // tokens for group, size in enumerate(self.sizes) if size]
            self._with_first_tokens[key] = RowGroups(sizes, torch.arange(len(sizes)), self.device)
        return self._with_first_tokens[key]

    @property
    def filled(self) -> Tensor:
        """int32 [filled groups, 4] of (first row, end row, slot, group) of each group that has rows."""
        return self._table("filled")[0]

    def chunks(self, length: int) -> Chunks:
        """Chunks of at most `length` rows, none of which crosses a group's border."""
        return Chunks(*self._table("chunks", length))

    def spans(self, length: int) -> Tensor:
        """int32 [tiles, 2]: the range of `filled` that touches each tile of a dense cut into `length` rows."""
        return self._table("spans", length)[0]

    @property
    def inverse_sizes(self) -> Tensor:
        """fp64 [groups]: 1 / size, and 1 for an empty group."""
        return self._table("inverse_sizes")[0]

    def host_tables(self, keys: Sequence[TableKey]) -> list[NDArray[Any]]:
        """The arrays of these tables, on the host; a table may have several."""
        return [array for tokens, name, length in keys for array in self.per_token(tokens)._host_table(name, length)]

    def adopt_tables(self, keys: Sequence[TableKey], tensors: Iterator[Tensor]) -> None:
        """Take from `tensors`, on the device, what `host_tables` has given for these keys, in its order."""
        for key in keys:
            self._samples._tables[key] = [next(tensors) for _ in range(_ARRAYS.get(key[1], 1))]

    def _table(self, name: str, length: int = 0) -> list[Tensor]:
        """A table of these groups on the device, made if there is none."""
        owner, key = self._samples, (self._tokens, name, length)
        if key not in owner._requested:
            # Nothing is written without need: torch.compile takes every write for a side effect.
            owner._requested.add(key)
        if key not in owner._tables:
            owner._tables[key] = to_device(self._host_table(name, length), self.device)
        return owner._tables[key]

    def _host_table(self, name: str, length: int) -> Sequence[NDArray[Any]]:
        if name == "inverse_sizes":
            return (1.0 / np.maximum(np.array(self.sizes, dtype=np.float64), 1.0),)
        if name == "filled":
            return (self._host_filled,)
        if name == "chunks":
            return chunk_tables(self._host_filled, length)
        return (span_table(self._host_filled, self.rows, length),)

    @cached_property
    def _host_filled(self) -> Table:
        return filled_groups(self.sizes, self.host_slots)

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """Runs of adjacent non-empty groups of equal size, for the batched products of the torch path."""
        filled = [group for group, size in enumerate(self.sizes) if size]
        runs, start = [], 0
        for size, members in groupby(filled, key=self.sizes.__getitem__):
            groups = list(members)
            stop = start + size * len(groups)
            slots = slot_index([self.host_slots[group] for group in groups], self.device)
            runs.append(Run(slice(start, stop), len(groups), size, slots))
            start = stop
        return tuple(runs)

    @cached_property
    def row_group(self) -> Tensor:
        """int64 [rows]: the group of each row."""
        sizes = torch.tensor(self.sizes, dtype=torch.int64)
        return torch.repeat_interleave(torch.arange(len(self.sizes)), sizes).to(self.device)


def _with_index(device: torch.device) -> torch.device:
    """The device as tensors there name it: `cuda` is not equal to their `cuda:0`."""
    if str(device) == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return device


def slot_index(slots: Sequence[int], device: torch.device) -> SlotIndex:
    """A slice where the slots are consecutive and ascending, else an index tensor."""
    if not slots:
        return slice(0, 0)
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


def consecutive_slots(slots: Tensor) -> Iterator[tuple[slice, slice]]:
    """Cut [n] slots on the CPU into runs of consecutive ones: which of the n, and their bank rows."""
    numbers = slots.numpy()
    starts = np.flatnonzero(np.diff(numbers, prepend=-2) != 1).tolist()
    for start, end in pairwise([*starts, len(numbers)]):
        first = int(numbers[start])
        yield slice(start, end), slice(first, first + end - start)


def slot_chunks(slots: Tensor, features: int, entries: int = 1 << 17) -> Iterator[tuple[slice, SlotIndex]]:
    """Cut [n] slots into pieces of about `entries` bank entries, which stay in a CPU's cache.

    Yields which of the n each piece covers and its bank rows; a piece of consecutive slots is a slice.
    """
    step = max(entries // max(features, 1), 1)
    numbers = slots.tolist()
    for start in range(0, len(numbers), step):
        rows = slice(start, min(start + step, len(numbers)))
        yield rows, slot_index(numbers[rows], slots.device)


def to_device(arrays: Sequence[NDArray[Any]], device: torch.device) -> list[Tensor]:
    """The arrays as tensors on `device`, in order; views of one tensor, unless the device is a CPU.

    A GPU gets them from page-locked memory, so that the host need not wait until its queue has come to the copy.
    """
    arrays = [np.ascontiguousarray(array) for array in arrays]
    if device.type == "cpu" or not arrays:
        return [torch.from_numpy(array) for array in arrays]
    starts = np.cumsum([0, *(-(-array.nbytes // _ALIGNMENT) * _ALIGNMENT for array in arrays)]).tolist()
    staging = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
    host = staging.numpy()
    for array, start in zip(arrays, starts, strict=False):
        host[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
    moved = staging.to(device, non_blocking=True)
    return [
        moved[start : start + array.nbytes].view(torch.from_numpy(array).dtype).view(array.shape)
        for array, start in zip(arrays, starts, strict=False)
    ]
