"""The plan of one pass: which samples go through which block, and whose adapter each of them meets.

And the tables of a local step, which are the plan of its pass and what else its kernels look up.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedra_engine.execution.lanes import Lane
from fedra_engine.federation.assignment import Assignment
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

    def with_tables(self, requested: Sequence[TableKey], tables: Iterator[Tensor]) -> BlockRows:
        """The same, with the index and the `requested` tables of the groups taken from `tables`, on the device."""
        index = None if self.index is None else next(tables)
        self.groups.adopt_tables(requested, tables)
        return replace(self, index=index)

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


def plan_groups(
    foundation: Foundation,
    sizes: Sequence[int],
    slots: NDArray[np.int64],
    *,
    scale: float = 1.0,
    copies: Sequence[ExitCopy] = (),
) -> SweepPlan:
    """Plan a pass whose groups have the first heads of the bank, one after another; see `make_plan`."""
    return make_plan(foundation, sizes, slots, np.arange(len(sizes)), scale=scale, copies=copies)[0]


def make_plan(
    foundation: Foundation,
    sizes: Sequence[int],
    slots: NDArray[np.int64],
    heads: NDArray[np.int64],
    *,
    scale: float,
    copies: Sequence[ExitCopy] = (),
    earlier: RequestedTables | None = None,
    others: Sequence[NDArray[Any]] = (),
) -> tuple[SweepPlan, list[Tensor]]:
    """Plan a batch of `sizes[i]` samples for group i; returns with it `others` on the device.

    Its tables and they go there in one copy, and with them all that kernels requested of an earlier plan; what they did
    not is made when it is requested.

    Args:
        foundation: the model.
        sizes: samples of each group, in the order of the batch.
        slots: int64 [groups, blocks], bank row of each group's adapter of each block; -1 where it skips the block.
        heads: int64 [groups], bank row of each group's head.
        scale: LoRA's alpha / rank.
        copies: which groups are copies of others at early exits.
        earlier: what kernels requested of an earlier plan.
        others: more arrays.
    """
    earlier = RequestedTables() if earlier is None else earlier
    of_blocks, of_heads, requested = sorted(earlier.blocks), sorted(earlier.heads), RequestedTables()
    counts = np.asarray(sizes, dtype=np.int64)
    owner = np.repeat(np.arange(len(counts)), counts)

    def groups(members: NDArray[np.int64], rows: NDArray[np.int64], kind: set[TableKey]) -> RowGroups:
        scales = torch.full((len(rows),), scale, dtype=foundation.adapter_dtype)
        return RowGroups(counts[members].tolist(), torch.from_numpy(rows), scales, foundation.device, kind)

    of_batch = groups(np.arange(len(counts)), heads, requested.heads)
    tables = of_batch.host_tables(of_heads)
    blocks: list[BlockRows | None] = []
    for block_slots in slots.T:
        clients = np.flatnonzero(block_slots >= 0)
        if len(clients) == 0:
            blocks.append(None)
            continue
        of_block = groups(clients, block_slots[clients], requested.blocks)
        index = None if len(clients) == len(counts) else torch.from_numpy(np.flatnonzero(block_slots[owner] >= 0))
        blocks.append(BlockRows(index, of_block, clients, of_block.rows))
        tables += [] if index is None else [index.numpy()]
        tables += of_block.host_tables(of_blocks)
    exits = _exit_rows(counts, copies)
    tables += [rows for exit in exits.values() for rows in exit]
    moved = iter(to_device([*tables, *others], foundation.device))
    of_batch.adopt_tables(of_heads, moved)
    there = tuple(None if block is None else block.with_tables(of_blocks, moved) for block in blocks)
    plan = SweepPlan(there, of_batch, {block: ExitRows(next(moved), next(moved)) for block in exits}, requested)
    return plan, list(moved)


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


class StepTables:
    """All index tables of a step; they fit as long as the same lanes take equally large batches.

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
        ranks: int64 [slots], LoRA rank of each slot's client.
    """

    def __init__(
        self,
        lanes: Sequence[Lane],
        foundation: Foundation,
        assignment: Assignment,
        scale: float,
        earlier: RequestedTables | None,
    ) -> None:
        """Make those for the coming step of `lanes`; see `make_plan`."""
        self.indices = tuple(lane.index for lane in lanes)
        self.sizes = tuple(len(lane.batch) for lane in lanes)
        self.group_owners, copies = _groups(lanes, assignment)
        slots = np.full((len(self.group_owners), foundation.depth), -1, dtype=np.int64)
        slots[: len(lanes)] = [lane.slots for lane in lanes]
        heads = [lane.heads[-1] for lane in lanes] + [head for lane in lanes for head in lane.heads[:-1]]
        own = [
            np.array(self.indices),
            np.array(self.sizes, dtype=np.float64),
            np.array([lane.step for lane in lanes]),
            *_owned([lane.heads for lane in lanes]),
            *_owned([lane.trained_slots for lane in lanes]),
            _ranks(lanes, assignment, foundation.adapter_layout.rank),
        ]
        exits = _exit_table(lanes, self.group_owners, foundation.adapter_dtype) if assignment.exits else ()
        self.plan, moved = make_plan(
            foundation,
            [self.sizes[owner] for owner in self.group_owners],
            slots,
            np.array(heads, dtype=np.int64),
            scale=scale,
            copies=copies,
            earlier=earlier,
            others=[*own, *exits],
        )
        mine, of_exits = moved[: len(own)], moved[len(own) :]
        self.lanes, self.samples, self.steps, self.heads, self.head_owners, *of_slots = mine
        self.slots, self.slot_owners, self.ranks = of_slots
        self.exits = ExitTable(len(lanes), assignment.distillation, *of_exits) if exits else None

    def fits(self, lanes: Sequence[Lane]) -> bool:
        """Whether these are the tables for the coming step of `lanes`."""
        return self.indices == tuple(lane.index for lane in lanes) and self.sizes == tuple(
            len(lane.batch) for lane in lanes
        )


def _owned(rows: Sequence[NDArray[np.int64]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The bank rows of all clients, one after another, and whose each is."""
    return np.concatenate(rows), np.repeat(np.arange(len(rows)), [len(of_client) for of_client in rows])


def _groups(lanes: Sequence[Lane], assignment: Assignment) -> tuple[tuple[int, ...], list[ExitCopy]]:
    """The client of each group, and which groups are copies."""
    owners = list(range(len(lanes)))
    copies = []
    for source, lane in enumerate(lanes):
        for exit in lane.exits[:-1].tolist():
            copies.append(ExitCopy(assignment.exits[exit], len(owners), source))
            owners.append(source)
    return tuple(owners), copies


def _ranks(lanes: Sequence[Lane], assignment: Assignment, full: int) -> NDArray[np.int64]:
    """`StepTables.ranks` on the host."""
    ranks = np.full(len(assignment.held), full) if assignment.ranks is None else assignment.ranks
    return np.repeat(ranks[[lane.row for lane in lanes]], [len(lane.trained_slots) for lane in lanes])


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
