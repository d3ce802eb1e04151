"""The plan of one pass: which samples go through which block, and whose adapter each of them meets."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
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
        """int64 [rows], where the rows of `tokens` tokens per sample stand in a batch of `samples`; cached."""
        key = (samples, tokens)
        if key not in self._token_indices:
            device = self.clients.device
            index = torch.arange(samples, device=device) if self.index is None else self.index
            self._token_indices[key] = (index[:, None] * tokens + torch.arange(tokens, device=device)).flatten()
        return self._token_indices[key]


@dataclass(frozen=True)
class ExitCopy:
    """A group of samples that stands for another one at an early exit.

    It skips every block. After `block` it takes over the hidden states of the group `source`, and so reaches what
    comes after the blocks with the state that the source had there.
    """

    block: int
    group: int
    source: int


@dataclass(frozen=True)
class ExitRows:
    """After a block, the samples `copies` take over the hidden states of `sources`; int64 [samples] each."""

    copies: Tensor
    sources: Tensor

    def take_over(self, hidden: Tensor) -> Tensor:
        """`hidden` [batch, …] with the copies' states replaced."""
        return hidden.index_copy(0, self.copies, hidden.index_select(0, self.sources))


@dataclass(frozen=True)
class SweepPlan:
    """A batch made of several groups of samples, one after another: a client's, or its copy at an early exit.

    Attributes:
        blocks: the samples of each block; None for a block that nobody holds.
        heads: all samples by group; the slots are rows of the head bank.
        exits: the early exits, by block.
    """

    blocks: tuple[BlockRows | None, ...]
    heads: RowGroups
    exits: Mapping[int, ExitRows]


def make_plan(
    sizes: Sequence[int],
    slots: NDArray[np.int64],
    heads: NDArray[np.int64],
    *,
    scale: float,
    dtype: torch.dtype,
    device: torch.device,
    copies: Sequence[ExitCopy] = (),
) -> SweepPlan:
    """Plan a batch of `sizes[i]` samples for group i.

    Args:
        sizes: samples of each group, in the order of the batch.
        slots: int64 [groups, blocks], bank row of each group's adapter of each block; -1 where it skips the block.
        heads: int64 [groups], bank row of each group's head.
        scale: LoRA's alpha / rank.
        dtype: precision of the scales.
        device: device of the tables.
        copies: which groups are copies of others at early exits.
    """
    counts = np.asarray(sizes, dtype=np.int64)
    owner = np.repeat(np.arange(len(counts)), counts)

    def groups(members: NDArray[np.int64], rows: NDArray[np.int64]) -> RowGroups:
        scales = torch.full((len(rows),), scale, dtype=dtype)
        return RowGroups(counts[members].tolist(), torch.from_numpy(rows), scales, device)

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
        blocks=tuple(block_rows(column) for column in slots.T),
        heads=groups(np.arange(len(counts)), heads),
        exits=_exit_rows(counts, copies, device),
    )


def single_client_plan(
    samples: int, slots: NDArray[np.int64], *, scale: float = 1.0, dtype: torch.dtype, device: torch.device
) -> SweepPlan:
    """Plan a batch of one client, whose head is the first of the bank; see `make_plan`.

    `slots` are int64 [blocks], the bank row of its adapter of each block; -1 where it skips the block.
    """
    head = np.zeros(1, dtype=np.int64)
    return make_plan([samples], slots[None], head, scale=scale, dtype=dtype, device=device)


def _exit_rows(counts: NDArray[np.int64], copies: Sequence[ExitCopy], device: torch.device) -> dict[int, ExitRows]:
    starts = np.cumsum(counts) - counts
    by_block: defaultdict[int, list[ExitCopy]] = defaultdict(list)
    for copy in copies:
        by_block[copy.block].append(copy)

    def rows(groups: list[int]) -> Tensor:
        members = [np.arange(starts[group], starts[group] + counts[group]) for group in groups]
        return torch.from_numpy(np.concatenate(members)).to(device)

    return {
        block: ExitRows(rows([copy.group for copy in some]), rows([copy.source for copy in some]))
        for block, some in by_block.items()
    }
