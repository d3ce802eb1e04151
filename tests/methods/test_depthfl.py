"""DepthFL's exits and their distillation, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from fedra_engine.config import DepthFLConfig
from fedra_engine.runtime.errors import InputError
from tests.methods.expected import mean_adapters
from tests.methods.rounds import EVERYBODY, initial_state, method, random_updates, run_round


def test_depthfl_averages_every_exit_over_those_who_have_it() -> None:
    made = method("depthfl", depthfl=DepthFLConfig(exit_every=2))
    state, updates = initial_state(made), random_updates(made)
    after = run_round(made, state, updates)
    assert state.heads.shape == after.heads.shape == (3, 7)
    np.testing.assert_allclose(after.adapters, mean_adapters(state, updates, "uniform"), atol=1e-12)
    for exit, holders in enumerate([EVERYBODY, EVERYBODY[:3], EVERYBODY[:1]]):
        expected = np.mean([updates[client].heads[exit].numpy() for client in holders], axis=0)
        np.testing.assert_allclose(after.heads[exit], expected, atol=1e-12)


def test_depthfls_distillation_rises() -> None:
    made = method("depthfl", depthfl=DepthFLConfig(exit_every=2, ramp_up_rounds=10))
    weights = [made.assign(EVERYBODY, round).distillation for round in (0, 5, 10, 50)]
    np.testing.assert_allclose(weights, [np.exp(-5), np.exp(-1.25), 1, 1])


def test_depthfl_holds_whole_stretches_between_exits() -> None:
    assignment = method("depthfl", depthfl=DepthFLConfig(exit_every=2)).assign(EVERYBODY, 0)
    assert assignment.held.sum(axis=1).tolist() == [6, 4, 4, 2, 2, 2]
    assert assignment.exits == (1, 3, 5)
    assert [assignment.exits_of(row).tolist() for row in range(4)] == [[0, 1, 2], [0, 1], [0, 1], [0]]


@pytest.mark.parametrize(("every", "capacity"), [(4, 6), (3, 2)])
def test_depthfl_needs_an_exit_that_somebody_reaches(every: int, capacity: int) -> None:
    with pytest.raises(InputError, match=r"method\.depthfl\.exit_every"):
        method("depthfl", capacities=np.full(6, capacity), depthfl=DepthFLConfig(exit_every=every))


def test_depthfl_predicts_by_the_exits_that_somebody_reaches() -> None:
    made = method("depthfl", capacities=np.full(6, 5), depthfl=DepthFLConfig(exit_every=2))
    assert made.evaluated_model().exits == (1, 3)
    assert made.evaluated_model().blocks.tolist() == [0, 1, 2, 3]
    assert len(initial_state(made).heads) == 2
