"""Rows of equal shape, memory-mapped in parts, gathered onto any device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

RESIDENT_SHARE = 0.25
"""Rows stay on an accelerator when they fit into this share of its free memory."""


class StoredRows:
    """One tensor [rows, …] in parts: [rows of the part, …] each, all of one shape and dtype.

    Rows that fit are copied to an accelerator once, when they are first asked for there. Others are gathered into
    page-locked memory, so that the copy does not hold up the host.
    """

    def __init__(self, parts: Sequence[Tensor]) -> None:
        """`parts` holds at least one part; several are on the CPU."""
        self._parts = list(parts)
        self._starts = np.cumsum([0, *map(len, self._parts)])
        self._resident: dict[torch.device, Tensor | None] = {}
        if self._parts[0].device.type != "cpu":
            (whole,) = self._parts
            self._resident[whole.device] = whole

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def row_shape(self) -> torch.Size:
        """Shape of one row."""
        return self._parts[0].shape[1:]

    def gather(self, rows: Tensor, device: torch.device) -> Tensor:
        """The rows `rows` (int64 [n], on the CPU), in that order, on `device`: [n, …]."""
        if device.type == "cpu":
            return self._gather(rows, pinned=False)
        whole = self._on_device(device)
        if whole is not None:
            return whole.index_select(0, copy_async(rows, whole.device))
        return self._gather(rows, pinned=device.type == "cuda").to(device, non_blocking=True)

    def _gather(self, rows: Tensor, *, pinned: bool) -> Tensor:
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
        for part, target in zip(self._parts, whole.split([len(part) for part in self._parts]), strict=True):
            target.copy_(part)
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
