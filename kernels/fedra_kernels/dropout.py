"""LoRA dropout from a counter hash: a mask entry depends on (key, row inside the group, column) alone.

So a client's mask is the same whichever clients share the launch, in torch and in Triton. The integer
finalizer is murmur3's; rows and columns are mixed on their own, and two multiply rounds join them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_MASK64 = (1 << 64) - 1
_CHUNK = 1 << 16
"""Entries hashed at a time: the int32 work buffers stay in the cache."""


@dataclass(frozen=True)
class Dropout:
    """LoRA dropout of one target.

    p: probability that an entry is dropped, 0 < p < 1.
    keys: int64 [groups], one key per group (see `dropout_key`).
    """

    p: float
    keys: Tensor

    def __post_init__(self) -> None:
        if not 0.0 < self.p < 1.0:
            raise ValueError(f"p: found {self.p}, expected 0 < p < 1")
        if self.keys.dtype != torch.int64 or self.keys.dim() != 1:
            raise ValueError(f"keys: found {self.keys.dtype} {list(self.keys.shape)}, expected torch.int64 [groups]")

    @property
    def threshold(self) -> int:
        """An entry is kept where its int32 hash is at least this."""
        return min(round(self.p * 2**32), 2**32 - 1) - 2**31


def dropout_key(*parts: int) -> int:
    """One 63-bit key from integers such as (seed, client, step, block, target), by splitmix64 rounds."""
    state = 0x9E3779B97F4A7C15
    for part in parts:
        state = (state ^ (part & _MASK64)) & _MASK64
        state = (state + 0x9E3779B97F4A7C15) & _MASK64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
        state ^= state >> 31
    return state >> 1


def dropout_keys(*parts: int | NDArray[np.int64]) -> NDArray[np.int64]:
    """`dropout_key` of arrays of integers, which are broadcast against each other."""
    state = np.array(0x9E3779B97F4A7C15, dtype=np.uint64)
    for part in parts:
        bits = np.uint64(part & _MASK64) if isinstance(part, int) else part.astype(np.uint64)
        state = splitmix(state ^ bits)
    return (state >> np.uint64(1)).astype(np.int64)


def splitmix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """One round of splitmix64 (Steele, Lea and Flood, 2014) of each number."""
    with np.errstate(over="ignore"):
        state = state + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return state ^ (state >> np.uint64(31))


def dropout_mask(
    key: int,
    rows: int,
    columns: int,
    p: float,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """[rows, columns] of 0 (dropped, with probability p) or 1 / (1 - p): the mask of one group."""
    keys = torch.tensor([key], dtype=torch.int64, device=device)
    keep = keep_mask(Dropout(p, keys), [rows], columns)
    return keep.to(dtype) / (1.0 - p)


def keep_mask(dropout: Dropout, sizes: Sequence[int], columns: int) -> Tensor:
    """bool [rows, columns]: True where an entry is kept; rows are those of all groups in order."""
    seeds = _row_seeds(dropout.keys, sizes)
    column_seeds = _mix(torch.arange(columns, dtype=torch.int32, device=dropout.keys.device))
    keep = torch.empty(len(seeds), columns, dtype=torch.bool, device=dropout.keys.device)
    step = max(_CHUNK // max(columns, 1), 1)
    for start in range(0, len(seeds), step):
        hashed = seeds[start : start + step, None] ^ column_seeds
        hashed.mul_(_signed(0x7FEB352D))
        _shift_xor_(hashed, 15)
        hashed.mul_(_signed(0x846CA68B))
        torch.ge(hashed, dropout.threshold, out=keep[start : start + step])
    return keep


def _row_seeds(keys: Tensor, sizes: Sequence[int]) -> Tensor:
    """int32 [rows] from each row's key and its number inside the group."""
    counts = torch.tensor(list(sizes), dtype=torch.int64)
    starts = torch.repeat_interleave(torch.cumsum(counts, 0) - counts, counts)
    numbers = (torch.arange(int(counts.sum())) - starts).to(device=keys.device, dtype=torch.int32)
    row_keys = torch.repeat_interleave(keys, counts.to(keys.device), output_size=len(numbers))
    low, high = row_keys.to(torch.int32), (row_keys >> 32).to(torch.int32)
    return _mix(_mix(numbers + low) ^ high)


def _mix(values: Tensor) -> Tensor:
    """murmur3's 32-bit finalizer; int32 arithmetic wraps."""
    values = values.clone()
    _shift_xor_(values, 16)
    values.mul_(_signed(0x85EBCA6B))
    _shift_xor_(values, 13)
    values.mul_(_signed(0xC2B2AE35))
    _shift_xor_(values, 16)
    return values


def _shift_xor_(values: Tensor, bits: int) -> None:
    """values ^= values >>> bits, in place: torch shifts int32 arithmetically, so the sign bits are masked."""
    values.bitwise_xor_((values >> bits).bitwise_and_((1 << (32 - bits)) - 1))


def _signed(constant: int) -> int:
    return constant - (1 << 32) if constant >= 1 << 31 else constant
