"""The plan of one pass: which samples go through which block, and whose adapter each of them meets.

And the tables of a local step, which are the plan of its pass and what else its kernels look up.
"""

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

from fedra_engine.execution.lanes import Lane
from fedra_engine.federation.assignment import Assignment
from fedra_engine.federation.rank_penalty import tail_mask
from fedra_engine.models.foundation import Foundation
from fedra_engine.models.task import ExitTable
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

    It skips every block. After `block` it gets the hidden states of the group `source`, and so reaches what comes after
    the blocks with the state that the source had there.
    """

    block: int
    group: int
    source: int


@dataclass(frozen=True)
class ExitRows:
    """After a block, the samples `copies` get the hidden states of `sources`; int64 [samples] each."""

    copies: Tensor
    sources: Tensor

    def copy_states(self, hidden: Tensor) -> Tensor:
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


def plan_groups(
    foundation: Foundation,
    sizes: Sequence[int],
    slots: NDArray[np.int64],
    *,
    scale: float = 1.0,
    copies: Sequence[ExitCopy] = (),
) -> SweepPlan:
    """Plan a pass whose groups have the first heads of the bank, one after another; see `HostPlan`."""
    heads, dtype, device = np.arange(len(sizes)), foundation.adapter_dtype, foundation.device
    return HostPlan(sizes, slots, heads, scale=scale, dtype=dtype, device=device, copies=copies).on_device()


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


@dataclass(frozen=True)
class StepTables:
    """All index tables of a step; they serve as long as the same lanes take equally large batches.

    The batch is made of groups: the samples of each client, then their copies at earlier exits.

    Attributes:
        indices, sizes: the lanes and their samples, in the order of the batch.
        group_owners: position of each group's client in the batch.
        plan: who goes through which block.
        exits: how groups at several exits belong together; None where every client has one classifier.
        lanes: int64 [clients], `indices` on the device.
        samples: float64 [clients], `sizes` on the device.
        steps: int64 [clients], local steps done by each.
        heads: int64 [heads], rows of the head bank in training.
        head_owners: int64 [heads], position of each head's client in the batch.
        slots: int64 [slots], rows of the adapter bank in training.
        slot_owners: int64 [slots], position of each slot's client in the batch.
        tail: bool [slots, rank], the penalised ranks of each slot; None without a penalty.
    """

    indices: tuple[int, ...]
    sizes: tuple[int, ...]
    group_owners: tuple[int, ...]
    plan: SweepPlan
    exits: ExitTable | None
    lanes: Tensor
    samples: Tensor
    steps: Tensor
    heads: Tensor
    head_owners: Tensor
    slots: Tensor
    slot_owners: Tensor
    tail: Tensor | None

    @classmethod
    def make(
        cls,
        lanes: Sequence[Lane],
        foundation: Foundation,
        assignment: Assignment,
        scale: float,
        earlier: RequestedTables | None,
    ) -> StepTables:
        """The tables for the coming step of `lanes`, in one copy to the device.

        With them go those that kernels requested of an earlier plan (`earlier`).
        """
        dtype, device = foundation.adapter_dtype, foundation.device
        owners, copies = _groups(lanes, assignment)
        slots = np.full((len(owners), foundation.depth), -1, dtype=np.int64)
        slots[: len(lanes)] = [lane.slots for lane in lanes]
        sizes = tuple(len(lane.batch) for lane in lanes)
        heads = [lane.heads[-1] for lane in lanes]
        heads += [lane.heads[e] for lane in lanes for e in range(len(lane.heads) - 1)]
        host_plan = HostPlan(
            [sizes[owner] for owner in owners],
            slots,
            np.array(heads, dtype=np.int64),
            scale=scale,
            dtype=dtype,
            device=device,
            copies=copies,
            earlier=earlier,
        )

        def owner_of(counts: Sequence[int]) -> NDArray[np.int64]:
            return np.repeat(np.arange(len(lanes)), counts)

        own = {
            "lanes": np.array([lane.index for lane in lanes]),
            "samples": np.array(sizes, dtype=np.float64),
            "steps": np.array([lane.step for lane in lanes]),
            "heads": np.concatenate([lane.heads for lane in lanes]),
            "head_owners": owner_of([len(lane.heads) for lane in lanes]),
            "slots": np.concatenate([lane.trained_slots for lane in lanes]),
            "slot_owners": owner_of([len(lane.trained_slots) for lane in lanes]),
        }
        exits = _exit_table(lanes, owners, dtype) if assignment.exits else ()
        tail = _tail(lanes, assignment, foundation.adapter_layout.rank)
        moved = iter(to_device([*host_plan.tables(), *own.values(), *exits, *tail], device))
        plan = host_plan.with_tables(moved)
        return cls(
            indices=tuple(lane.index for lane in lanes),
            sizes=sizes,
            group_owners=owners,
            plan=plan,
            **{name: next(moved) for name in own},
            exits=ExitTable(len(lanes), assignment.distillation, *(next(moved) for _ in exits)) if exits else None,
            tail=next(moved) if tail else None,
        )

    def fits(self, lanes: Sequence[Lane]) -> bool:
        """Whether these are the tables for the coming step of `lanes`."""
        return self.indices == tuple(lane.index for lane in lanes) and self.sizes == tuple(
            len(lane.batch) for lane in lanes
        )


def _groups(lanes: Sequence[Lane], assignment: Assignment) -> tuple[tuple[int, ...], list[ExitCopy]]:
    """The client of each group, and which groups are copies."""
    owners = list(range(len(lanes)))
    copies = []
    for source, lane in enumerate(lanes):
        for exit in lane.exits[:-1].tolist():
            copies.append(ExitCopy(assignment.exits[exit], len(owners), source))
            owners.append(source)
    return tuple(owners), copies


def _tail(lanes: Sequence[Lane], assignment: Assignment, rank: int) -> tuple[()] | tuple[NDArray[np.bool_]]:
    """`StepTables.tail` on the host, if there is one."""
    if assignment.rank_penalty == 0 or assignment.ranks is None:
        return ()
    ranks = [assignment.ranks[lane.row] for lane in lanes for _ in lane.trained_slots]
    return (tail_mask(torch.from_numpy(np.asarray(ranks)), assignment.keep_ratio, rank).numpy(),)


def _exit_table(lanes: Sequence[Lane], owners: Sequence[int], dtype: torch.dtype) -> tuple[NDArray[Any], ...]:
    """The tensors of the `ExitTable` on the host; shares in `dtype`."""
    sizes = np.array([len(lane.batch) for lane in lanes])
    group_sizes = sizes[list(owners)]
    starts = np.cumsum(group_sizes) - group_sizes
    clients = np.repeat(np.arange(len(lanes)), sizes)
    within = np.arange(len(clients)) - starts[clients]
    most = max(len(lane.exits) for lane in lanes)
    rows, present = np.zeros((len(clients), most), dtype=np.int64), np.zeros((len(clients), most), dtype=np.bool_)
    filled = np.zeros(len(lanes), dtype=np.int64)
    for group, owner in enumerate(owners):
        mine = clients == owner
        rows[mine, filled[owner]] = starts[group] + within[mine]
        present[mine, filled[owner]] = True
        filled[owner] += 1
    return rows, present, clients, torch.from_numpy(1 / sizes[clients]).to(dtype).numpy()
