"""The plan of one pass: which samples go through which block, and whose adapter each of them meets.

Also the index tables of a local step: the plan of its pass, and the bank rows that clipping and optimizer work on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

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
class SampleRows:
    """Some samples of a batch.

    Attributes:
        index: int64 [samples], their positions in the batch; None for all.
        device: of the batch.
    """

    index: Tensor | None
    device: torch.device
    _token_indices: dict[tuple[int, int], Tensor] = field(default_factory=dict, repr=False, compare=False, kw_only=True)

    def token_index(self, samples: int, tokens: int) -> Tensor:
        """Positions of these samples' tokens in a batch of `samples` of `tokens` tokens each, int64 [rows]; cached."""
        key = (samples, tokens)
        if key not in self._token_indices:
            index = _numbers(samples, self.device) if self.index is None else self.index
            self._token_indices[key] = (index[:, None] * tokens + _numbers(tokens, self.device)).flatten()
        return self._token_indices[key]


@dataclass(frozen=True)
class BlockRows(SampleRows):
    """The samples that go through a block.

    Attributes:
        groups: the samples by group, with each group's row of the adapter bank.
        clients: int64 [groups] on the host, the position of each group among all groups of the batch.
        first_token_groups: for so many of the last groups the block is the last one, and only the first token of their
            samples is computed; 0 if all tokens are.
    """

    groups: RowGroups
    clients: NDArray[np.int64]
    first_token_groups: int = 0


@lru_cache(maxsize=64)
def _numbers(count: int, device: torch.device) -> Tensor:
    """A torch.arange that all blocks share."""
    return torch.arange(count, device=device)


class ExitCopy(NamedTuple):
    """A `group` of samples that copies the hidden states of the group `source` after `block`, an early exit.

    It skips every block, so the layers after the blocks get the source's states at the exit.
    """

    block: int
    group: int
    source: int


@dataclass(frozen=True)
class RequestedTables:
    """The kernel tables that were requested in a step, of the groups of blocks and of heads."""

    blocks: set[TableKey] = field(default_factory=set)
    heads: set[TableKey] = field(default_factory=set)

    def clear(self) -> None:
        """Forget the requests: with texts of another length the next step needs other tables."""
        self.blocks.clear()
        self.heads.clear()


@dataclass(frozen=True)
class SweepPlan:
    """The plan of a batch of consecutive groups of samples, each a client's or its copy at an early exit.

    Attributes:
        blocks: the samples of each block; None for a block that nobody holds.
        heads: all samples by group, with each group's row of the head bank.
        exits: by block, the positions of copies and of their sources, int64 [samples] each.
        replaced: by block, the samples that pass through its stand-in.
    """

    blocks: tuple[BlockRows | None, ...]
    heads: RowGroups
    exits: Mapping[int, tuple[Tensor, Tensor]]
    replaced: Mapping[int, SampleRows]


def plan_groups(
    foundation: Foundation,
    sizes: Sequence[int],
    slots: NDArray[np.int64],
    *,
    copies: Sequence[ExitCopy] = (),
    fewest_first_token_samples: int | None = None,
) -> SweepPlan:
    """`make_plan` where group i has row i of the head bank."""
    heads = np.arange(len(sizes))
    return make_plan(
        foundation, sizes, slots, heads, copies=copies, fewest_first_token_samples=fewest_first_token_samples
    )[0]


def make_plan(
    foundation: Foundation,
    sizes: Sequence[int],
    slots: NDArray[np.int64],
    heads: NDArray[np.int64],
    *,
    copies: Sequence[ExitCopy] = (),
    replaced: NDArray[np.bool_] | None = None,
    requested: RequestedTables | None = None,
    others: Sequence[NDArray[Any]] = (),
    fewest_first_token_samples: int | None = None,
) -> tuple[SweepPlan, list[Tensor]]:
    """Plan a batch of `sizes[i]` samples for group i. Returns the plan, and `others` on the device.

    All tables go to the device in one copy, also those that are `requested`; others are made when a kernel asks.

    Args:
        sizes: number of samples of each group, in the order of the batch.
        slots: int64 [groups, blocks], the adapter bank's rows; -1 where a group skips the block.
        heads: int64 [groups], the head bank's rows.
        copies: which groups are copies of others at early exits.
        replaced: bool [groups, blocks], where a group passes through the block's stand-in; nowhere when None.
        requested: what kernels requested of the plan before; collects what they request of this one.
        others: further arrays to copy to the device.
        fewest_first_token_samples: as of `SweepModel`.
    """
    requested = RequestedTables() if requested is None else requested
    of_blocks, of_heads = sorted(requested.blocks), sorted(requested.heads)
    counts = np.asarray(sizes, dtype=np.int64)
    owner = np.repeat(np.arange(len(counts)), counts)
    every, starts = np.arange(len(counts)), counts.cumsum() - counts

    def groups(members: NDArray[np.int64], rows: NDArray[np.int64], kind: set[TableKey]) -> RowGroups:
        return RowGroups(counts[members].tolist(), torch.from_numpy(rows), foundation.device, kind)

    of_batch = groups(every, heads, requested.heads)
    tables = of_batch.host_tables(of_heads)
    holders = _holders(slots, counts, fewest_first_token_samples)
    held = {block: groups(here, slots[here, block], requested.blocks) for block, (here, _) in holders.items()}
    indexed = {block for block, (here, _) in holders.items() if not np.array_equal(here, every)}
    for block, of_block in held.items():
        if block in indexed:
            tables.append(_sample_positions(starts, counts, holders[block][0]))
        tables += of_block.host_tables(of_blocks)
    exits = _exit_rows(owner, copies)
    tables += [rows for pair in exits.values() for rows in pair]
    through_maps = {} if replaced is None else {b: row for b, row in enumerate(replaced.T) if row.any()}
    tables += [np.flatnonzero(row[owner]) for row in through_maps.values()]
    moved = iter(to_device([*tables, *others], foundation.device))
    of_batch.adopt_tables(of_heads, moved)
    blocks: list[BlockRows | None] = [None] * slots.shape[1]
    for block, of_block in held.items():
        index = next(moved) if block in indexed else None
        of_block.adopt_tables(of_blocks, moved)
        blocks[block] = BlockRows(index, foundation.device, of_block, *holders[block])
    exit_rows = {block: (next(moved), next(moved)) for block in exits}
    replaced_rows = {block: SampleRows(next(moved), foundation.device) for block in through_maps}
    return SweepPlan(tuple(blocks), of_batch, exit_rows, replaced_rows), list(moved)


def _holders(
    slots: NDArray[np.int64], counts: NDArray[np.int64], fewest_first_token_samples: int | None
) -> dict[int, tuple[NDArray[np.int64], int]]:
    """`BlockRows.clients` and `BlockRows.first_token_groups` of each block that somebody holds.

    `counts` are the samples of each group.
    """
    last = np.where(slots >= 0, np.arange(slots.shape[1]), -1).max(axis=1, initial=-1)
    found = {}
    for block, row in enumerate(slots.T):
        here = np.flatnonzero(row >= 0)
        ends = last[here] == block
        if len(here) == 0:
            continue
        if fewest_first_token_samples is not None and (
            ends.all() or counts[here[ends]].sum() >= fewest_first_token_samples
        ):
            # They stand last.
            found[block] = here[np.argsort(ends, kind="stable")], int(ends.sum())
        else:
            found[block] = here, 0
    return found


def _sample_positions(
    starts: NDArray[np.int64], counts: NDArray[np.int64], here: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Positions in the batch of the samples of the groups `here`; group i has `counts[i]` from `starts[i]` on."""
    of_each = counts[here]
    return np.arange(of_each.sum()) + np.repeat(starts[here] - (of_each.cumsum() - of_each), of_each)


def _exit_rows(
    owner: NDArray[np.int64], copies: Sequence[ExitCopy]
) -> dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """`SweepPlan.exits` on the host; `owner` int64 [samples] is each sample's group."""
    exits = {}
    for block in dict.fromkeys(copy.block for copy in copies):
        pairs = [(copy.group, copy.source) for copy in copies if copy.block == block]
        here, sources = ([np.flatnonzero(owner == group) for group in groups] for groups in zip(*pairs, strict=True))
        exits[block] = (np.concatenate(here), np.concatenate(sources))
    return exits


class StepBatch(NamedTuple):
    """The samples of a local step, in the order of the batch.

    Attributes:
        rows: int64 [samples], sample rows.
        steps: int64 [groups], the local step of each group's client, from 0.
    """

    rows: NDArray[np.int64]
    steps: NDArray[np.int64]


class StepTables:
    """The index tables of some local steps of the same clients, in which each takes batches of one size.

    The groups of the batch are the samples of each client, then their copies at earlier exits.

    Attributes:
        lanes: the clients, in the order of the batch.
        clients: int64 [groups], the client of each group.
        sizes: samples of each group.
        left: steps that these tables serve and that have not been taken.
        plan: the plan of a pass.
        exits: how groups at several exits belong together; None where every client has one classifier.
        indices: int64 [clients], lane indices.
        samples: float64 [clients], batch sizes.
        steps: int64 [clients], number of local steps done, which each step counts.
        heads, head_owners: int64 [heads], rows of the head bank in training, and their positions in `lanes`.
        slots, slot_owners: int64 [slots], rows of the adapter bank in training, and their positions in `lanes`.
        ranks: int64 [slots], LoRA ranks.
    """

    def __init__(
        self,
        lanes: Sequence[Lane],
        foundation: Foundation,
        assignment: Assignment,
        requested: RequestedTables,
        *,
        fewest_first_token_samples: int | None = None,
    ) -> None:
        """Make the tables for the next steps of `lanes`; see `make_plan`."""
        self.lanes = lanes
        self.left = min(lane.same_until[lane.step] - lane.step for lane in lanes)
        sizes = [len(lane.batch) for lane in lanes]
        copies = [(exit, source) for source, lane in enumerate(lanes) for exit in range(len(lane.exits) - 1)]
        owners = [*range(len(lanes)), *(source for _, source in copies)]
        self.sizes = [sizes[owner] for owner in owners]
        self.clients = np.array([lanes[owner].client for owner in owners], dtype=np.int64)
        self._batches = [lane.batches[lane.step : lane.step + self.left] for lane in (lanes[owner] for owner in owners)]
        self._first = np.array([lanes[owner].step for owner in owners], dtype=np.int64)
        self._taken = 0
        slots = np.full((len(owners), foundation.depth), -1, dtype=np.int64)
        slots[: len(lanes)] = [lane.slots for lane in lanes]
        replaced = None
        if assignment.replaced is not None:
            replaced = np.zeros_like(slots, dtype=np.bool_)
            replaced[: len(lanes)] = assignment.replaced[[lane.row for lane in lanes]]
        heads = [lane.heads[-1] for lane in lanes] + [lanes[source].heads[exit] for exit, source in copies]
        exits = _exit_table(sizes, owners, foundation.adapter_dtype) if assignment.exits else ()
        self.plan, moved = make_plan(
            foundation,
            self.sizes,
            slots,
            np.array(heads, dtype=np.int64),
            copies=[
                ExitCopy(assignment.exits[lanes[source].exits[exit]], len(lanes) + copy, source)
                for copy, (exit, source) in enumerate(copies)
            ],
            replaced=replaced,
            requested=requested,
            others=[*self._of_clients(assignment, foundation.adapter_layout.rank), *exits],
            fewest_first_token_samples=fewest_first_token_samples,
        )
        self.indices, self.samples, self.steps, self.heads, self.head_owners, *others = moved
        self.slots, self.slot_owners, self.ranks, *of_exits = others
        self.exits = ExitTable(len(lanes), assignment.distillation, *of_exits) if of_exits else None

    def next_batch(self) -> StepBatch:
        """What the clients take in the next step, which is then no longer left.

        The lanes count their steps when none is left.
        """
        taken, self._taken, self.left = self._taken, self._taken + 1, self.left - 1
        if not self.left:
            for lane in self.lanes:
                lane.step += self._taken
        return StepBatch(np.concatenate([batches[taken] for batches in self._batches]), self._first + taken)

    def _of_clients(self, assignment: Assignment, rank: int) -> list[NDArray[Any]]:
        """The arrays from `indices` to `ranks`; adapters have the `rank` unless the assignment gives another one."""
        lanes = self.lanes
        ranks = [rank if assignment.ranks is None else assignment.ranks[lane.row] for lane in lanes]
        trained = [lane.trained_slots for lane in lanes]
        return [
            np.array([lane.index for lane in lanes]),
            np.array(self.sizes[: len(lanes)], dtype=np.float64),
            np.array([lane.step for lane in lanes]),
            *_owned([lane.heads for lane in lanes]),
            *_owned(trained),
            np.repeat(ranks, [len(of_client) for of_client in trained]),
        ]


def _owned(rows: Sequence[NDArray[np.int64]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Concatenate the bank rows of all clients; returns them with the position of each one's client."""
    return np.concatenate(rows), np.repeat(np.arange(len(rows)), [len(of_client) for of_client in rows])


def _exit_table(sizes: Sequence[int], owners: Sequence[int], dtype: torch.dtype) -> tuple[NDArray[Any], ...]:
    """The arrays of an `ExitTable` for clients with batches of `sizes`; group i is of the client `owners[i]`."""
    group_sizes = np.array(sizes)[list(owners)]
    starts = np.cumsum(group_sizes) - group_sizes
    clients = np.repeat(np.arange(len(sizes)), sizes)
    within = np.arange(len(clients)) - starts[clients]
    filled = np.zeros(len(sizes), dtype=np.int64)
    most = int(np.bincount(owners).max())
    rows, present = np.zeros((len(clients), most), dtype=np.int64), np.zeros((len(clients), most), dtype=np.bool_)
    for group, owner in enumerate(owners):
        mine = clients == owner
        rows[mine, filled[owner]] = starts[group] + within[mine]
        present[mine, filled[owner]] = True
        filled[owner] += 1
    return rows, present, clients, torch.from_numpy(1 / np.array(sizes)[clients]).to(dtype).numpy()
