"""The plan of one pass: which samples go through which block, and whose adapter each of them meets."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedra_kernels import RowGroups, to_device
from fedra_kernels.groups import TableKey


@dataclass(frozen=True)
class BlockRows:
    """The samples that go through a block.

    Attributes:
        index: int64 [samples], their positions in the batch; None when all go through.
        groups: the same samples by client; the slots are rows of the adapter bank.
        clients: int64 [groups], the position in the batch of each group's client, on the host.
        samples: how many go through.
    """

    index: Tensor | None
    groups: RowGroups
    clients: NDArray[np.int64]
    samples: int
    _token_indices: dict[tuple[int, int], Tensor] = field(default_factory=dict, repr=False, compare=False)

    def token_index(self, samples: int, tokens: int) -> Tensor:
        """int64 [rows], where the rows of `tokens` tokens per sample stand in a batch of `samples`; cached."""
        key = (samples, tokens)
        if key not in self._token_indices:
            device = self.groups.device
            index = _numbers(samples, device) if self.index is None else self.index
            self._token_indices[key] = (index[:, None] * tokens + _numbers(tokens, device)).flatten()
        return self._token_indices[key]


@lru_cache(maxsize=64)
def _numbers(count: int, device: torch.device) -> Tensor:
    """int64 [count]: 0, 1, …; the same tensor for all blocks."""
    return torch.arange(count, device=device)


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
class RequestedTables:
    """The tables that kernels requested of a plan in a step: of its blocks and of its heads."""

    blocks: set[TableKey] = field(default_factory=set)
    heads: set[TableKey] = field(default_factory=set)

    def clear(self) -> None:
        """Forget them: texts may be longer or shorter in the next step, and need other tables."""
        self.blocks.clear()
        self.heads.clear()


@dataclass(frozen=True)
class SweepPlan:
    """A batch made of several groups of samples, one after another: a client's, or its copy at an early exit.

    Attributes:
        blocks: the samples of each block; None for a block that nobody holds.
        heads: all samples by group; the slots are rows of the head bank.
        exits: the early exits, by block.
        requested: the tables that kernels requested of it, so that the next plan can bring them along.
    """

    blocks: tuple[BlockRows | None, ...]
    heads: RowGroups
    exits: Mapping[int, ExitRows]
    requested: RequestedTables


class HostPlan:
    """A plan whose tables are still on the host.

    Among them are those that kernels requested of an earlier plan; others are made when they are requested.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        slots: NDArray[np.int64],
        heads: NDArray[np.int64],
        *,
        scale: float,
        dtype: torch.dtype,
        device: torch.device,
        copies: Sequence[ExitCopy] = (),
        earlier: RequestedTables | None = None,
    ) -> None:
        """Plan a batch of `sizes[i]` samples for group i.

        Args:
            sizes: samples of each group, in the order of the batch.
            slots: int64 [groups, blocks], bank row of each group's adapter of each block; -1 where it skips the block.
            heads: int64 [groups], bank row of each group's head.
            scale: LoRA's alpha / rank.
            dtype: precision of the scales.
            device: where the tables will be.
            copies: which groups are copies of others at early exits.
            earlier: what kernels requested of an earlier plan.
        """
        earlier = RequestedTables() if earlier is None else earlier
        self._of_blocks, self._of_heads = sorted(earlier.blocks), sorted(earlier.heads)
        self._device = device
        self._requested = requested = RequestedTables()
        counts = np.asarray(sizes, dtype=np.int64)
        owner = np.repeat(np.arange(len(counts)), counts)

        def groups(members: NDArray[np.int64], rows: NDArray[np.int64], kind: set[TableKey]) -> RowGroups:
            scales = torch.full((len(rows),), scale, dtype=dtype)
            return RowGroups(counts[members].tolist(), torch.from_numpy(rows), scales, device, kind)

        self._blocks: list[tuple[NDArray[np.int64], NDArray[np.int64] | None, RowGroups] | None] = []
        for block_slots in slots.T:
            held = block_slots >= 0
            clients = np.flatnonzero(held)
            index = None if held.all() else np.flatnonzero(held[owner])
            of_block = groups(clients, block_slots[clients], requested.blocks)
            self._blocks.append((clients, index, of_block) if len(clients) else None)
        self._heads = groups(np.arange(len(counts)), heads, requested.heads)
        self._exits = _exit_rows(counts, copies)

    def on_device(self) -> SweepPlan:
        """The plan, whose tables are copied to the device."""
        return self.with_tables(iter(to_device(self.tables(), self._device)))

    def tables(self) -> list[NDArray[Any]]:
        """All that must go to the device, in the order in which `with_tables` takes it."""
        tables = self._heads.host_tables(self._of_heads)
        for block in self._blocks:
            if block is not None:
                _, index, groups = block
                tables += [] if index is None else [index]
                tables += groups.host_tables(self._of_blocks)
        return tables + [rows for exit in self._exits.values() for rows in exit]

    def with_tables(self, tables: Iterator[Tensor]) -> SweepPlan:
        """The plan; takes from `tables`, on the device, as many as `tables()` has."""
        self._heads.adopt_tables(self._of_heads, tables)
        blocks = [None if block is None else self._block_rows(*block, tables) for block in self._blocks]
        exits = {block: ExitRows(next(tables), next(tables)) for block in self._exits}
        return SweepPlan(tuple(blocks), self._heads, exits, self._requested)

    def _block_rows(
        self, clients: NDArray[np.int64], index: NDArray[np.int64] | None, groups: RowGroups, tables: Iterator[Tensor]
    ) -> BlockRows:
        moved = None if index is None else next(tables)
        groups.adopt_tables(self._of_blocks, tables)
        return BlockRows(index=moved, groups=groups, clients=clients, samples=groups.rows)


def single_client_plan(
    samples: int, slots: NDArray[np.int64], *, scale: float = 1.0, dtype: torch.dtype, device: torch.device
) -> SweepPlan:
    """Plan a batch of one client, whose head is the first of the bank; see `HostPlan`.

    `slots` are int64 [blocks], the bank row of its adapter of each block; -1 where it skips the block.
    """
    head = np.zeros(1, dtype=np.int64)
    return HostPlan([samples], slots[None], head, scale=scale, dtype=dtype, device=device).on_device()


def _exit_rows(
    counts: NDArray[np.int64], copies: Sequence[ExitCopy]
) -> dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """`ExitRows` on the host, by block."""
    starts = np.cumsum(counts) - counts
    by_block: defaultdict[int, list[ExitCopy]] = defaultdict(list)
    for copy in copies:
        by_block[copy.block].append(copy)

    def rows(groups: list[int]) -> NDArray[np.int64]:
        return np.concatenate([np.arange(starts[group], starts[group] + counts[group]) for group in groups])

    return {
        block: (rows([copy.group for copy in here]), rows([copy.source for copy in here]))
        for block, here in by_block.items()
    }
