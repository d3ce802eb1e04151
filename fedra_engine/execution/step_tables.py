"""The index tables of a step of the sweep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedra_engine.execution.exits import ExitTable
from fedra_engine.execution.lanes import Lane
from fedra_engine.execution.plan import ExitCopy, HostPlan, RequestedTables, SweepPlan
from fedra_engine.federation.assignment import Assignment
from fedra_engine.models.foundation import Foundation
from fedra_kernels import to_device


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
        ranks: int64 [slots], LoRA rank of each slot's client.
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
    ranks: Tensor

    @classmethod
    def make(
        cls,
        lanes: Sequence[Lane],
        foundation: Foundation,
        assignment: Assignment,
        scale: float,
        like: Tensor,
        earlier: RequestedTables | None,
    ) -> StepTables:
        """The tables for the coming step of `lanes`; scales in the dtype, and all on the device of `like`.

        All go to the device in one copy, with those that kernels requested of an earlier plan (`earlier`).
        """
        device = like.device
        owners, copies = _groups(lanes, assignment)
        slots = np.full((len(owners), foundation.depth), -1, dtype=np.int64)
        for row, lane in zip(slots, lanes, strict=False):
            row[lane.blocks] = lane.slots
        sizes = tuple(len(lane.batch) for lane in lanes)
        heads = [lane.heads[-1] for lane in lanes]
        heads += [lane.heads[e] for lane in lanes for e in range(len(lane.heads) - 1)]
        host_plan = HostPlan(
            [sizes[owner] for owner in owners],
            slots,
            np.array(heads, dtype=np.int64),
            scale=scale,
            dtype=like.dtype,
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
            "ranks": _ranks(lanes, assignment, foundation.adapter_layout.rank),
        }
        exits = _exit_table(lanes, owners, like) if assignment.exits else ()
        moved = iter(to_device([*host_plan.tables(), *own.values(), *exits], device))
        plan = host_plan.with_tables(moved)
        return cls(
            indices=tuple(lane.index for lane in lanes),
            sizes=sizes,
            group_owners=owners,
            plan=plan,
            **{name: next(moved) for name in own},
            exits=ExitTable(*(next(moved) for _ in exits)) if exits else None,
        )

    def serve(self, lanes: Sequence[Lane]) -> bool:
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


def _ranks(lanes: Sequence[Lane], assignment: Assignment, full: int) -> NDArray[np.int64]:
    """`StepTables.ranks` on the host."""
    ranks = np.full(len(assignment.held), full) if assignment.ranks is None else assignment.ranks
    return np.repeat(ranks[[lane.row for lane in lanes]], [len(lane.trained_slots) for lane in lanes])


def _exit_table(lanes: Sequence[Lane], owners: Sequence[int], like: Tensor) -> tuple[NDArray[Any], ...]:
    """The fields of the `ExitTable` on the host; shares in the dtype of `like`."""
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
    return rows, present, clients, torch.from_numpy(1 / sizes[clients]).to(like.dtype).numpy()
