"""Lanes: which clients train next, what they are handed, and what comes back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fedra_engine.execution.banks import SpareBanks
from fedra_engine.execution.lanes import LanePool
from fedra_engine.execution.scheduling import longest_first
from fedra_engine.federation.assignment import Assignment
from fedra_engine.federation.local_terms import ProximalTerm
from fedra_engine.models.state import GlobalState
from fedra_engine.studies.measure import IdleExecutor
from tests.execution.test_assignments import EXITS, early_exits, mixed_ranks
from tests.tiny_federation import SGD, Setting, make_setting

CLIENTS = np.arange(6)


@pytest.fixture
def setting() -> Setting:
    return make_setting("vit", SGD)


def pool_of(setting: Setting, lanes: int) -> tuple[LanePool, Assignment, GlobalState]:
    work, assignment = setting.work(0, CLIENTS)
    state = setting.state()
    return LanePool(work, assignment, state, setting.foundation, lanes=lanes), assignment, state


def next_pool(setting: Setting, lanes: int, spare: SpareBanks, **changes: Any) -> LanePool:
    work, assignment = setting.work(0, CLIENTS)
    work = replace(work, training=replace(work.training, **changes))
    return LanePool(work, assignment, setting.state(), setting.foundation, lanes=lanes, spare=spare)


def finish(pool: LanePool, client: int) -> None:
    (lane,) = [lane for lane in pool.in_training() if lane.client == client]
    lane.step = len(lane.batches)


def test_lanes_are_given_to_the_longest_clients_first(setting: Setting) -> None:
    work, assignment = setting.work(0, CLIENTS)
    order = longest_first(assignment.held, work.steps()).tolist()
    pool, _, _ = pool_of(setting, 2)
    assert pool.refill()
    for following in order[2:]:
        first = min(pool.in_training(), key=lambda lane: lane.index)
        finish(pool, first.client)
        # No lane is given before the updates are taken.
        assert not pool.refill()
        pool.losses[first.index] = 1
        updates = pool.take_finished()
        assert updates is not None
        assert updates.clients.tolist() == [first.client]
        assert pool.refill()
        assert not pool.losses[first.index]
        assert following in [lane.client for lane in pool.in_training() if lane.index == first.index]
    for lane in pool.in_training():
        lane.step = len(lane.batches)
    assert pool.take_finished() is not None
    assert not pool.refill()
    assert pool.in_training() == []


def test_banks_of_a_round_that_has_ended_serve_the_next(setting: Setting) -> None:
    spare = SpareBanks()
    first = next_pool(setting, 4, spare)
    # It has not ended.
    second = next_pool(setting, 4, spare)
    assert second.adapters is not first.adapters
    second.end()
    fewer = next_pool(setting, 3, spare)
    assert (fewer.adapters, fewer.heads) == (second.adapters, second.heads)
    fewer.end()
    more = next_pool(setting, 5, spare)
    assert more.adapters is not second.adapters
    more.end()
    assert next_pool(setting, 5, spare, momentum=0.5).adapters is not more.adapters


def test_there_are_no_more_lanes_than_clients(setting: Setting) -> None:
    pool, _, _ = pool_of(setting, 50)
    pool.refill()
    assert sorted(lane.index for lane in pool.in_training()) == list(range(len(CLIENTS)))
    assert len(pool.losses) == len(CLIENTS)


def test_clients_with_more_samples_in_the_coming_step_stand_first(setting: Setting) -> None:
    pool, _, _ = pool_of(setting, 6)
    pool.refill()
    sizes = [len(lane.batch) for lane in pool.in_training()]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) > 1


def test_each_held_block_has_a_row_of_its_own_with_the_global_adapters(setting: Setting) -> None:
    pool, assignment, state = pool_of(setting, 4)
    pool.refill()
    lanes = pool.in_training()
    slots = np.stack([lane.slots for lane in lanes])
    assert ((slots >= 0) == assignment.held[[lane.row for lane in lanes]]).all()
    assert len(set(slots[slots >= 0].tolist())) == (slots >= 0).sum()
    for lane in lanes:
        held = np.flatnonzero(lane.slots >= 0)
        assert torch.equal(pool.adapters.parameters[lane.slots[held]], state.adapters[held])
        assert torch.equal(pool.heads.parameters[lane.heads], state.heads)


def test_what_is_not_trained_has_a_slot_but_no_update(setting: Setting) -> None:
    setting.assignment = lambda allocation: Assignment(np.ones_like(allocation), trained=allocation)
    pool, assignment, _ = pool_of(setting, 6)
    pool.refill()
    for lane in pool.in_training():
        assert (lane.slots >= 0).all()
        assert ((lane.trained >= 0) == assignment.trained_blocks[lane.row]).all()
        lane.step = len(lane.batches)
    updates = pool.take_finished()
    assert updates is not None
    for position, client in enumerate(updates.clients.tolist()):
        found = updates.slot_blocks[updates.slot_owners == position]
        assert found.tolist() == np.flatnonzero(assignment.trained_blocks[client]).tolist()


def test_updates_hold_what_finished_clients_trained(setting: Setting) -> None:
    pool, assignment, state = pool_of(setting, 3)
    pool.refill()
    assert pool.take_finished() is None
    first, second, third = pool.in_training()
    for number, lane in enumerate((first, third), start=1):
        pool.adapters.parameters[lane.trained_slots] += number
        pool.heads.parameters[lane.heads] -= number
        pool.losses[lane.index] = 10.0 * number
        lane.step = len(lane.batches)
    updates = pool.take_finished()
    assert updates is not None
    assert pool.in_training() == [second]
    changes = {first.client: 1, third.client: 2}
    assert set(updates.clients.tolist()) == set(changes)
    for position, client in enumerate(updates.clients.tolist()):
        update, change = updates.of_client(position), changes[client]
        blocks = np.flatnonzero(assignment.held[client])
        assert update.blocks.tolist() == blocks.tolist()
        torch.testing.assert_close(update.adapters, state.adapters[blocks] + change)
        torch.testing.assert_close(update.heads, state.heads - change)
        assert float(updates.losses[position]) == 10.0 * change
        assert updates.samples[position] == updates.processed[position] == len(setting.clients.samples[client])
    entries = [update.adapters.numel() + update.heads.numel() for update in map(updates.of_client, range(2))]
    expected = [changes[client] * np.sqrt(size) for client, size in zip(updates.clients.tolist(), entries, strict=True)]
    assert updates.norms is not None
    np.testing.assert_allclose(updates.norms.numpy(), expected, rtol=1e-12)


def test_a_lane_of_low_rank_starts_with_zeros_beyond_it(setting: Setting) -> None:
    setting.assignment = mixed_ranks
    pool, assignment, state = pool_of(setting, 6)
    pool.refill()
    layout = setting.foundation.adapter_layout
    assert assignment.ranks is not None
    for lane in pool.in_training():
        held = np.flatnonzero(lane.slots >= 0)
        expected = state.adapters[held].clone()
        layout.truncate(expected, int(assignment.ranks[lane.row]))
        assert torch.equal(pool.adapters.parameters[lane.slots[held]], expected)


def test_a_lane_has_the_heads_of_the_exits_it_reaches(setting: Setting) -> None:
    setting = replace(setting, assignment=early_exits, exits=len(EXITS))
    pool, assignment, state = pool_of(setting, 6)
    pool.refill()
    rows = [row for lane in pool.in_training() for row in lane.heads.tolist()]
    assert len(set(rows)) == len(rows)
    for lane in pool.in_training():
        assert lane.exits.tolist() == assignment.exits_of(lane.row).tolist()
        assert torch.equal(pool.heads.parameters[lane.heads], state.heads[lane.exits])


@pytest.mark.parametrize("terms", [(), (ProximalTerm(0.1),)], ids=["none", "proximal"])
def test_gradients_that_terms_gave_to_idle_rows_do_not_reach_the_next_client(
    setting: Setting, terms: tuple[ProximalTerm, ...]
) -> None:
    setting.assignment = lambda held: Assignment(held, terms=terms)
    pool, _, _ = pool_of(setting, 2)
    for bank in (pool.adapters, pool.heads):
        bank.gradients.fill_(1)
    pool.refill()
    # Without terms, only rows in training get gradients, and their step has reset them.
    found = [bool(bank.gradients[row].any()) for bank, row in ((pool.adapters, 0), (pool.heads, 0))]
    assert found == [not terms] * 2


def test_an_idle_executor_returns_everything_as_it_was(setting: Setting) -> None:
    work, assignment = setting.work(0, CLIENTS)
    state, seen = setting.state(), []
    for updates in IdleExecutor(setting.foundation, 2).train(work, assignment, state):
        assert updates.norms is not None
        assert not updates.norms.any()
        seen += updates.clients.tolist()
    assert sorted(seen) == CLIENTS.tolist()
