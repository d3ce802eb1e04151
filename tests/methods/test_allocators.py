"""The allocators beside FedRA's own: who holds what, how often, and what they remember."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedra_engine.methods.allocators import ALLOCATORS, register_allocator
from fedra_engine.methods.base import Federation, Method
from fedra_engine.runtime.errors import InputError
from tests.methods.rounds import (
    CAPACITIES,
    DEPTH,
    EVERYBODY,
    ROUNDS,
    federation,
    initial_state,
    method,
    random_updates,
    run_round,
)

MANY = 40_000


def drawn(name: str, capacity: int, known: Federation, round: int = 0) -> np.ndarray:
    """The blocks of many clients of one `capacity`."""
    rng, capacities = np.random.default_rng(0), np.full(MANY, capacity)
    return ALLOCATORS[name](round, capacities, np.arange(MANY), DEPTH, rng, known)


def assert_near(shares: np.ndarray, chances: np.ndarray) -> None:
    """Of `MANY` draws, each share is within four standard errors of its chance."""
    assert (np.abs(shares - chances) <= 4 * np.sqrt(chances * (1 - chances) / MANY)).all()


@pytest.mark.parametrize("name", sorted(ALLOCATORS))
def test_no_client_holds_more_blocks_than_it_can_and_the_same_ones_when_asked_again(name: str) -> None:
    made, again = method("fedra", allocation=name), method("fedra", allocation=name)
    for round in range(ROUNDS):
        held = made.assign(EVERYBODY, round).held
        np.testing.assert_array_equal(held, again.assign(EVERYBODY, round).held)
        if name != "full":
            assert (held.sum(axis=1) <= CAPACITIES).all()


def test_first_always_holds_the_first_block_and_draws_the_others_equally_often() -> None:
    assert_near(drawn("first", 3, federation()).mean(axis=0), np.array([1, *[2 / 5] * 5]))


def test_ends_always_holds_both_ends_and_draws_the_others_equally_often() -> None:
    assert_near(drawn("ends", 3, federation()).mean(axis=0), np.array([1, *[1 / 4] * 4, 1]))
    assert_near(drawn("ends", 1, federation()).mean(axis=0), np.eye(DEPTH)[0])


def test_rotated_windows_of_all_clients_move_on_by_one_block_every_round() -> None:
    made = method("fedra", allocation="rotated")
    for round in range(DEPTH + 2):
        for row, capacity in zip(made.assign(EVERYBODY, round).held, CAPACITIES, strict=True):
            assert set(np.flatnonzero(row)) == {(round + step) % DEPTH for step in range(capacity)}


def test_growing_clients_begin_with_one_block_and_have_their_capacity_from_half_the_run_on() -> None:
    made = method("fedra", allocation="growing")
    counts = np.stack([made.assign(EVERYBODY, round).held.sum(axis=1) for round in range(ROUNDS)])
    expected = [[1 + int((c - 1) * min(1, round / (ROUNDS / 2))) for c in CAPACITIES] for round in range(ROUNDS)]
    np.testing.assert_array_equal(counts, expected)
    assert (counts[0] == 1).all()
    assert (counts[ROUNDS // 2 :] == CAPACITIES).all()
    # Where there is no other round, the only one is the last.
    assert_near(drawn("growing", 2, replace(federation(), rounds=1), round=1).mean(axis=0), np.full(DEPTH, 2 / 6))


def test_importance_draws_blocks_half_equally_often_and_half_as_their_adapters_move() -> None:
    assert_near(drawn("importance", 1, federation()).mean(axis=0), np.full(DEPTH, 1 / 6))
    nothing = replace(federation(), movement=np.full(DEPTH, np.nan))
    assert_near(drawn("importance", 1, nothing).mean(axis=0), np.full(DEPTH, 1 / 6))
    # The last block was never trained and counts as the mean of the others.
    moved = replace(federation(), movement=np.array([8.0, 1, 1, 0, 0, np.nan]))
    chances = 0.5 / 6 + 0.5 * np.array([8, 1, 1, 0, 0, 2]) / 12
    assert_near(drawn("importance", 1, moved).mean(axis=0), chances)
    second = sum(np.outer(chances / (1 - chances), chances) * (1 - np.eye(DEPTH)))
    assert_near(drawn("importance", 2, moved).mean(axis=0), chances + second)


def test_movement_is_the_average_norm_of_the_change_over_the_rounds_in_which_a_block_was_held() -> None:
    made, seen = method("fedra", allocation="importance"), list[np.ndarray]()
    state, expected = initial_state(made), np.full(DEPTH, np.nan)
    for round in range(4):
        updates = random_updates(made, round, np.array([3, 4]))
        held = sorted({block for update in updates for block in update.adapters})
        after = run_round(made, state, updates, round)
        for block in held:
            norm = np.linalg.norm((after.adapters[block] - state.adapters[block]).numpy())
            expected[block] = norm if np.isnan(expected[block]) else 0.9 * expected[block] + 0.1 * norm
        state = after
        seen.append(made.tensors()["movement"].numpy())
        np.testing.assert_allclose(seen[-1], expected, rtol=1e-12)
    assert np.isnan(seen[0]).any()
    assert not np.isnan(seen[-1]).any()


@pytest.mark.parametrize("name", ["fedra", "hetlora"])
def test_importance_goes_on_after_a_restart(name: str) -> None:
    def after_two(restart: bool) -> tuple[torch.Tensor, np.ndarray]:
        made = method(name, allocation="importance")
        state = run_round(made, initial_state(made), random_updates(made), 0)
        if restart:
            tensors, made = made.tensors(), method(name, allocation="importance")
            made.restore(tensors)
        run_round(made, state, random_updates(made, 1), 1)
        return made.tensors()["movement"], draws(made)

    def draws(made: Method) -> np.ndarray:
        return np.stack([made.assign(EVERYBODY, round).held for round in range(2, 42)])

    (movement, held), (expected, wanted) = after_two(True), after_two(False)
    assert torch.equal(movement, expected)
    np.testing.assert_array_equal(held, wanted)
    assert (wanted != draws(method(name, allocation="importance"))).any()


def test_other_allocations_leave_nothing_of_the_movement_in_checkpoints() -> None:
    made = method("fedra")
    run_round(made, initial_state(made), random_updates(made))
    assert made.tensors() == {}


@pytest.mark.parametrize("name", ["fedsalora", "flora", "flexlora", "fedexlora"])
def test_importance_is_refused_where_the_server_does_not_see_how_adapters_move(name: str) -> None:
    with pytest.raises(InputError, match=rf"^method\.allocation: found importance with method\.name {name}, expected"):
        method(name, allocation="importance")


@pytest.mark.usefixtures("own_names")
def test_an_allocator_of_ones_own_may_use_the_movement() -> None:
    seen = []

    @register_allocator("moved", uses=["movement"])
    def moved(round, capacities, participants, depth, rng, federation) -> np.ndarray:
        seen.append(federation.movement)
        return np.ones((len(participants), depth), dtype=np.bool_)

    made = method("fedit", allocation="moved")
    run_round(made, initial_state(made), random_updates(made))
    made.assign(EVERYBODY, 1)
    assert seen[0] is None
    assert (seen[-1] > 0).all()
