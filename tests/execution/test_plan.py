"""Plans of passes: who goes through which block, with whose adapter, and the tables that go to the device with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fedra_engine.config import LoraConfig
from fedra_engine.execution import plan as plans
from fedra_engine.execution.lanes import LanePool
from fedra_engine.execution.plan import ExitCopy, RequestedTables, StepTables, SweepPlan, make_plan, plan_groups
from fedra_engine.models.foundation import Foundation
from tests.execution.test_assignments import EXITS, early_exits
from tests.tiny import make_tiny
from tests.tiny_federation import SAMPLE_COUNTS, SGD, make_setting

SLOTS = np.array([[1, -1, 0], [2, -1, -1]])


@pytest.fixture(scope="module")
def foundation() -> Foundation:
    return make_tiny("vit", LoraConfig(target_modules=["fc1"]))


def planned(foundation: Foundation, requested: RequestedTables | None = None) -> SweepPlan:
    return make_plan(foundation, [2, 3], SLOTS, np.arange(2), requested=requested)[0]


def step(plan: SweepPlan, tokens: int, requested: RequestedTables | None = None) -> list[torch.Tensor]:
    """Ask for tables as the kernels of a step on texts of `tokens` tokens do."""
    if requested is not None:
        requested.clear()
    asked = [plan.heads.filled]
    for rows in plan.blocks:
        if rows is not None:
            groups = rows.groups.per_token(tokens)
            asked += [groups.filled, groups.spans(4), groups.chunks(3).rows, groups.chunks(3).groups]
    return asked


def test_the_samples_of_the_holders_go_through_a_block(foundation: Foundation) -> None:
    first, second, third = planned(foundation).blocks
    assert first is not None
    assert (first.index, first.groups.sizes, first.groups.host_slots) == (None, (2, 3), (1, 2))
    assert second is None
    assert third is not None
    assert third.index is not None
    assert third.index.tolist() == [0, 1]
    assert (third.groups.sizes, third.groups.host_slots, third.clients.tolist()) == ((2,), (0,), [0])
    assert first.token_index(5, 2).tolist() == list(range(10))
    assert third.token_index(5, 2).tolist() == [0, 1, 2, 3]


def test_heads_and_other_arrays_keep_their_order(foundation: Foundation) -> None:
    others = [np.array([7, 8]), np.array([0.5])]
    plan, moved = make_plan(foundation, [2, 3], SLOTS, np.array([4, 1]), others=others)
    assert plan.heads.host_slots == (4, 1)
    assert [tensor.tolist() for tensor in moved] == [[7, 8], [0.5]]


def test_a_copy_gets_the_states_of_its_source_after_its_block(foundation: Foundation) -> None:
    slots = np.array([[0, 1, 2], [3, 4, -1], [-1, -1, -1]])
    plan = plan_groups(foundation, [2, 1, 2], slots, copies=[ExitCopy(1, 2, 0)])
    assert [None if rows is None or rows.index is None else rows.index.tolist() for rows in plan.blocks] == [
        [0, 1, 2],
        [0, 1, 2],
        [0, 1],
    ]
    assert set(plan.exits) == {1}
    assert [rows.tolist() for rows in plan.exits[1]] == [[3, 4], [0, 1]]


def test_a_step_lists_each_clients_slots_and_heads() -> None:
    setting = make_setting("vit", SGD)
    work, assignment = setting.work(0, np.arange(6))
    pool = LanePool(work, assignment, setting.state(), setting.foundation, lanes=3)
    pool.refill()
    lanes = pool.in_training()
    taken = [lane.batch.tolist() for lane in lanes]
    tables = StepTables(lanes, setting.foundation, assignment, RequestedTables())
    assert tables.steps.tolist() == [0, 0, 0]
    assert tables.exits is None
    assert tables.samples.tolist() == tables.sizes == [len(lane.batch) for lane in lanes]
    for position, lane in enumerate(lanes):
        assert tables.slots[tables.slot_owners == position].tolist() == lane.trained_slots.tolist()
        held = [rows is not None and position in rows.clients.tolist() for rows in tables.plan.blocks]
        assert held == assignment.held[lane.row].tolist()
    batch = tables.next_batch()
    assert batch.rows.tolist() == [row for rows in taken for row in rows]
    assert batch.steps.tolist() == [0, 0, 0]


def test_tables_serve_the_steps_until_a_client_ends_or_a_batch_has_another_size() -> None:
    setting = make_setting("vit", replace(SGD, batch_size=2, local_epochs=2))
    work, assignment = setting.work(0, np.arange(6))
    pool = LanePool(work, assignment, setting.state(), setting.foundation, lanes=2)
    pool.refill()
    served = []
    while lanes := pool.in_training():
        tables = StepTables(lanes, setting.foundation, assignment, RequestedTables())
        before = [(lane.client, lane.step) for lane in lanes]
        assert tables.clients.tolist() == [client for client, _ in before]
        for step in range(count := tables.left):
            batch = tables.next_batch()
            assert batch.steps.tolist() == [first + step for _, first in before]
            expected = [lane.batches[first + step] for lane, (_, first) in zip(lanes, before, strict=True)]
            assert batch.rows.tolist() == np.concatenate(expected).tolist()
            assert tables.sizes == [len(rows) for rows in expected]
        assert not tables.left
        assert [lane.step for lane in lanes] == [first + count for _, first in before]
        # No further step would have done.
        assert any(lane.step == len(lane.batches) for lane in lanes) or tables.sizes != [len(x.batch) for x in lanes]
        served.append((count, tables.sizes))
        pool.take_finished()
        pool.refill()
    assert max(count for count, _ in served) > 1
    assert sum(count * sum(sizes) for count, sizes in served) == 2 * sum(SAMPLE_COUNTS)


def test_exits_of_a_client_are_rows_of_the_same_sample() -> None:
    setting = make_setting("vit", SGD)
    setting.assignment, setting.exits = early_exits, len(EXITS)
    work, assignment = setting.work(0, np.arange(6))
    pool = LanePool(work, assignment, setting.state(), setting.foundation, lanes=6)
    pool.refill()
    lanes = pool.in_training()
    tables = StepTables(lanes, setting.foundation, assignment, RequestedTables())
    assert tables.exits is not None
    own = np.concatenate([lane.batch for lane in lanes])
    samples = tables.next_batch().rows
    rows, present = tables.exits.rows.numpy(), tables.exits.present.numpy()
    assert (samples[rows] == own[:, None])[present].all()
    counts = np.array([len(lane.exits) for lane in lanes])
    assert present.sum(1).tolist() == counts[tables.exits.clients.numpy()].tolist()
    # Every row of the logits belongs to one sample at one exit.
    assert sorted(rows[present].tolist()) == list(range(len(samples)))


def test_what_was_asked_of_a_plan_in_its_last_step_goes_with_the_next_one(
    foundation: Foundation, monkeypatch: pytest.MonkeyPatch
) -> None:
    requested = RequestedTables()
    plan = planned(foundation, requested)
    for tokens in (5, 7, 6):
        step(plan, tokens, requested)
    copied: list[int] = []
    to_device = plans.to_device

    def count(arrays: Sequence[NDArray[Any]], device: torch.device) -> list[torch.Tensor]:
        copied.append(len(arrays))
        return to_device(arrays, device)

    monkeypatch.setattr(plans, "to_device", count)
    again = planned(foundation, requested)
    # Of the heads one table; of two blocks four arrays each, and which samples go through the one that not all hold.
    assert copied == [1 + 2 * 4 + 1]
    found, expected = step(again, 6), step(planned(foundation), 6)
    assert all(torch.equal(mine, other) for mine, other in zip(found, expected, strict=True))


def test_tables_that_were_not_asked_of_the_plan_before_are_made_when_they_are(foundation: Foundation) -> None:
    requested = RequestedTables()
    step(planned(foundation, requested), 5)
    found, expected = step(planned(foundation, requested), 7), step(planned(foundation), 7)
    assert all(torch.equal(mine, other) for mine, other in zip(found, expected, strict=True))
