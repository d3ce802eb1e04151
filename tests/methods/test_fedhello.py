"""Which blocks Fed-HeLLo lets clients train."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args, get_type_hints

import numpy as np
import pytest

from fedra_engine.config import FedHelloConfig
from fedra_engine.methods.fedhello import chances, pattern
from fedra_engine.methods.registry import make_method
from fedra_engine.runtime.errors import InputError
from tests.methods.expected import mean_adapters
from tests.methods.rounds import (
    CAPACITIES,
    DEPTH,
    EVERYBODY,
    federation,
    initial_state,
    method,
    random_updates,
    run_round,
)


@pytest.mark.parametrize("adapted", [[0, 1, 2, 3, 4, 5], [1, 3, 4]])
@pytest.mark.parametrize("selection", ["random", "first", "last", "bottleneck", "spread", "fisher"])
def test_everybody_runs_all_blocks_and_trains_as_many_as_its_capacity(selection: str, adapted: list[int]) -> None:
    """Or all that have adapters, if those are fewer."""
    known = federation(name="fedhello", fedhello=FedHelloConfig(selection=selection, fisher_every=1))
    made = make_method(replace(known, adapted=np.isin(np.arange(DEPTH), adapted)))
    for round in range(2):
        assignment = made.assign(EVERYBODY, round)
        assert assignment.held.all()
        assert not np.delete(assignment.trained_blocks, adapted, axis=1).any()
        np.testing.assert_array_equal(assignment.trained_blocks.sum(axis=1), np.minimum(CAPACITIES, len(adapted)))
        made.after_round(initial_state(made), round)


def test_each_pattern_chooses_its_blocks() -> None:
    found = {name: np.flatnonzero(pattern(name, 3, 6)).tolist() for name in ("first", "last", "bottleneck", "spread")}
    assert found == {"first": [0, 1, 2], "last": [3, 4, 5], "bottleneck": [0, 1, 5], "spread": [0, 2, 5]}


@pytest.mark.parametrize("depth", [6, 12])
@pytest.mark.parametrize("name", ["first", "last", "bottleneck", "spread"])
def test_patterns_have_as_many_blocks_as_asked(name: str, depth: int) -> None:
    assert [pattern(name, count, depth).sum() for count in range(1, depth + 1)] == list(range(1, depth + 1))


def test_chances_follow_the_scores_in_three_steps() -> None:
    found = chances(np.array([1.0, 5.0, 9.0, 9.1, 5.1, 1.1]))
    np.testing.assert_allclose(found, np.array([1, 2, 3, 3, 2, 1]) / 12)
    np.testing.assert_allclose(chances(np.zeros(4)), np.full(4, 0.25))


def test_fisher_information_changes_the_chances_when_it_is_due_and_they_survive_a_restart() -> None:
    made = method("fedhello", fedhello=FedHelloConfig(fisher_every=2))
    state = initial_state(made)
    drawn = []
    for round in range(2):
        drawn.append(made.tensors()["chances"].numpy().copy())
        state = run_round(made, state, random_updates(made, round), round)
    np.testing.assert_allclose(drawn, np.full((2, DEPTH), 1 / DEPTH))
    np.testing.assert_allclose(made.tensors()["chances"], np.array([1, 2, 3, 3, 2, 1]) / 12)
    restored = method("fedhello")
    restored.restore(made.tensors())
    np.testing.assert_array_equal(restored.assign(EVERYBODY, 2).trained, made.assign(EVERYBODY, 2).trained)


def test_scores_that_are_not_finite_are_bad_input() -> None:
    options = FedHelloConfig(fisher_every=1)
    made = make_method(replace(federation(name="fedhello", fedhello=options), fisher=lambda *_: np.full(DEPTH, np.nan)))
    with pytest.raises(InputError, match=r"^method\.fedhello\.selection: found no sample with a finite gradient"):
        made.after_round(initial_state(made), 0)


@pytest.mark.parametrize("weighting", ["uniform", "samples"])
def test_fedhello_averages_over_the_clients_that_trained_a_block(weighting: str) -> None:
    made = method("fedhello", weighting=weighting)
    state, updates = initial_state(made), random_updates(made)
    trained = made.assign(EVERYBODY, 0).trained_blocks
    assert [sorted(update.adapters) for update in updates] == [np.flatnonzero(row).tolist() for row in trained]
    after = run_round(made, state, updates)
    np.testing.assert_allclose(after.adapters, mean_adapters(state, updates, weighting), atol=1e-12)


@pytest.mark.parametrize("selection", get_args(get_type_hints(FedHelloConfig)["selection"]))
def test_rounds_without_participants_are_assigned_by_every_selection_of_fedhello(selection: str) -> None:
    nobody = np.array([], dtype=np.int64)
    assert method("fedhello", fedhello=FedHelloConfig(selection=selection)).assign(nobody, 0).held.shape == (0, DEPTH)
