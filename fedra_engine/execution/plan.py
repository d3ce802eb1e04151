"""The plan of one pass: which samples go through which block, and whose adapter each of them meets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedra_kernels import RowGroups


@dataclass(frozen=True)
class BlockRows:
    """The samples that go through a block.

    Attributes:
        index: int64 [samples], their positions in the batch; None when all go through.
        groups: the same samples by client; the slots are rows of the adapter bank.
        clients: int64 [groups], the position in the batch of each group's client.
        samples: how many go through.
    """

    index: Tensor | None
    groups: RowGroups
    clients: Tensor
    samples: int
    _token_indices: dict[tuple[int, int], Tensor] = field(default_factory=dict, repr=False, compare=False)

    def token_index(self, samples: int, tokens: int) -> Tensor:
        """int64 [rows], where the rows of `tokens` tokens a sample stand in a batch of `samples`; cached."""
        key = (samples, tokens)
        if key not in self._token_indices:
            device = self.clients.device
            index = torch.arange(samples, device=device) if self.index is None else self.index
            self._token_indices[key] = (index[:, None] * tokens + torch.arange(tokens, device=device)).flatten()
        return self._token_indices[key]


@dataclass(frozen=True)
class SweepPlan:
    """A batch made of several clients' samples, client after client.

    Attributes:
        blocks: the samples of each block; None for a block that nobody holds.
        heads: all samples by client; the slots are rows of the head bank.
    """

    blocks: tuple[BlockRows | None, ...]
    heads: RowGroups


def make_plan(
    sizes: Sequence[int],
    slots: NDArray[np.int64],
    heads: NDArray[np.int64],
    *,
    scale: float,
    dtype: torch.dtype,
    device: torch.device,
) -> SweepPlan:
    """Plan a batch of `sizes[i]` samples for client i.

    Args:
        sizes: samples of each client, in the order of the batch.
        slots: int64 [clients, blocks], bank row of each client's adapter of each block; -1 where it holds none.
        heads: int64 [clients], bank row of each client's head.
        scale: LoRA's alpha / rank.
        dtype: precision of the scales.
        device: device of the tables.
    """
    counts = np.asarray(sizes, dtype=np.int64)
    owner = np.repeat(np.arange(len(counts)), counts)

    def groups(clients: NDArray[np.int64], rows: NDArray[np.int64]) -> RowGroups:
        scales = torch.full((len(rows),), scale, dtype=dtype)
        return RowGroups(counts[clients].tolist(), torch.from_numpy(rows), scales, device)

    def block_rows(block_slots: NDArray[np.int64]) -> BlockRows | None:
        held = block_slots >= 0
        if not held.any():
            return None
        clients = np.flatnonzero(held)
        index = None if held.all() else torch.from_numpy(np.flatnonzero(held[owner])).to(device)
        return BlockRows(
            index=index,
            groups=groups(clients, block_slots[clients]),
            clients=torch.from_numpy(clients).to(device),
            samples=int(counts[clients].sum()),
        )

    return SweepPlan(
        blocks=tuple(block_rows(column) for column in slots.T), heads=groups(np.arange(len(counts)), heads)
    )
