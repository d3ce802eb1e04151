"""Rows of equal shape, memory-mapped in parts, gathered onto any device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedra_engine.data.row_cache import Part, as_tensor, row_checksums
from fedra_engine.runtime.files import content_hash

RESIDENT_SHARE = 0.25
"""Rows stay on an accelerator when they fit into this share of its free memory."""


class StoredRows:
    """One tensor [rows, …] in parts: [rows of the part, …] each, all of one shape and dtype.

    Rows that fit are copied to an accelerator once, when they are first asked for there. Others are gathered into
    page-locked memory, so that the copy does not hold up the host. Rows of a file are compared with their checksums
    whenever they are read; where one is damaged, its part is made again.
    """

    def __init__(self, parts: Sequence[Tensor]) -> None:
        """`parts` holds at least one part; several are on the CPU."""
        self._parts = list(parts)
        self._starts = np.cumsum([0, *map(len, self._parts)])
        self._resident: dict[torch.device, Tensor | None] = {}
        if self._parts[0].device.type != "cpu":
            (whole,) = self._parts
            self._resident[whole.device] = whole
        self._column = ""
        self._files: list[Part] | None = None
        self._checksums: NDArray[np.uint64] | None = None

    @classmethod
    def of_parts(cls, parts: Sequence[Part], column: str) -> StoredRows:
        """The rows of a column of all parts."""
        rows = cls([as_tensor(part.columns[column]) for part in parts])
        rows._column = column
        if all(part.checksums for part in parts):
            rows._files = list(parts)
            rows._checksums = np.concatenate([part.checksums[column] for part in parts])
        return rows

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def row_shape(self) -> torch.Size:
        """Shape of one row."""
        return self._parts[0].shape[1:]

    def digest(self, rows: Tensor | None = None) -> str:
        """Hex digest of the rows `rows` (int64 [n], on the CPU), or of all, in order; of their shape and dtype, too.

        Rows of files are not read for it.
        """
        if self._checksums is None:
            self._checksums = np.concatenate([row_checksums(part.cpu().contiguous().numpy()) for part in self._parts])
        checksums = self._checksums if rows is None else self._checksums[rows.numpy()]
        about = f"{self._parts[0].dtype} {tuple(self.row_shape)} {len(checksums)} "
        return content_hash(about.encode() + checksums.tobytes()).hexdigest()

    def gather(self, rows: Tensor, device: torch.device) -> Tensor:
        """The rows `rows` (int64 [n], on the CPU), in that order, on `device`: [n, …]."""
        if device.type == "cpu":
            return self._gather(rows, pinned=False)
        whole = self._on_device(device)
        if whole is not None:
            return whole.index_select(0, copy_async(rows, whole.device))
        return self._gather(rows, pinned=device.type == "cuda").to(device, non_blocking=True)

    def _gather(self, rows: Tensor, *, pinned: bool) -> Tensor:
        gathered = self._read(rows, pinned=pinned)
        if self._files is None:
            return gathered
        assert self._checksums is not None
        damaged = rows.numpy()[row_checksums(gathered.numpy()) != self._checksums[rows.numpy()]]
        if not len(damaged):
            return gathered
        for part in np.unique(np.searchsorted(self._starts, damaged, side="right") - 1):
            self._make_again(int(part))
        return self._read(rows, pinned=pinned)

    def _make_again(self, part: int) -> None:
        assert self._files is not None
        make_again = self._files[part].make_again
        assert make_again is not None
        self._files[part] = make_again()
        self._parts[part] = as_tensor(self._files[part].columns[self._column])

    def _read(self, rows: Tensor, *, pinned: bool) -> Tensor:
        first = self._parts[0]
        gathered = torch.empty((len(rows), *self.row_shape), dtype=first.dtype, pin_memory=pinned)
        if len(self._parts) == 1:
            return torch.index_select(first, 0, rows, out=gathered)
        part_of = np.searchsorted(self._starts, rows.numpy(), side="right") - 1
        order = np.argsort(part_of, kind="stable")
        used, begins = np.unique(part_of[order], return_index=True)
        # NumPy copies whole rows where torch's index_put_ copies values one by one.
        target = gathered.numpy()
        for part, at in zip(used, np.split(order, begins[1:]), strict=True):
            target[at] = self._parts[part].numpy()[rows.numpy()[at] - self._starts[part]]
        return gathered

    def _on_device(self, device: torch.device) -> Tensor | None:
        """All rows on `device`; None when they do not fit."""
        if str(device) == "cuda":
            device = torch.device("cuda", torch.cuda.current_device())
        if device not in self._resident:
            self._resident[device] = self._copy(device) if self._fits(device) else None
        return self._resident[device]

    def _copy(self, device: torch.device) -> Tensor:
        whole = torch.empty((len(self), *self.row_shape), dtype=self._parts[0].dtype, device=device)
        for index, target in enumerate(whole.split(np.diff(self._starts).tolist())):
            if self._files is not None:
                sums = self._files[index].checksums[self._column]
                if not np.array_equal(row_checksums(self._parts[index].numpy()), sums):
                    self._make_again(index)
            target.copy_(self._parts[index])
        return whole

    def _fits(self, device: torch.device) -> bool:
        if device.type != "cuda":
            return False
        free, _ = torch.cuda.mem_get_info(device)
        return sum(part.nbytes for part in self._parts) <= RESIDENT_SHARE * free


def copy_async(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` (on the CPU) on `device`, without waiting for what is still running there."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
