"""Who holds what under each method."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch

from fedra_engine.config import DepthFLConfig, FedHelloConfig
from fedra_engine.federation.assignment import Assignment
from fedra_engine.methods.hetlora import tail_mask
from fedra_engine.methods.registry import METHODS, make_method
from fedra_engine.runtime.errors import InputError
from tests.methods.rounds import CAPACITIES, DEPTH, EVERYBODY, federation, initial_state, method

RANDOM = ["fedra", "fedit", "ffalora", "fedsalora", "flora", "flexlora", "fedexlora"]


@pytest.mark.parametrize("name", RANDOM)
@pytest.mark.parametrize("allocation", [None, "uniform", "reference", "covered"])
def test_random_allocation_gives_each_client_its_capacity_anew_every_round(name: str, allocation: str | None) -> None:
    made = method(name, allocation=allocation)
    first, second = (made.assign(EVERYBODY, round).held for round in range(2))
    np.testing.assert_array_equal(first.sum(axis=1), CAPACITIES)
    np.testing.assert_array_equal(second.sum(axis=1), CAPACITIES)
    assert (first != second).any()


@pytest.mark.parametrize("allocation", ["uniform", "reference", "prefix", "full"])
def test_a_clients_row_does_not_depend_on_who_else_takes_part(allocation: str) -> None:
    fedra = method("fedra", allocation=allocation)
    participants = np.array([1, 4])
    np.testing.assert_array_equal(fedra.assign(participants, 3).held, fedra.assign(EVERYBODY, 3).held[participants])


@pytest.mark.parametrize("name", METHODS)
def test_rounds_without_participants_are_assigned(name: str) -> None:
    nobody = np.array([], dtype=np.int64)
    assert method(name).assign(nobody, 0).held.shape == (0, DEPTH)


@pytest.mark.parametrize("selection", get_args(get_type_hints(FedHelloConfig)["selection"]))
def test_rounds_without_participants_are_assigned_by_every_selection_of_fedhello(selection: str) -> None:
    nobody = np.array([], dtype=np.int64)
    assert method("fedhello", fedhello=FedHelloConfig(selection=selection)).assign(nobody, 0).held.shape == (0, DEPTH)


def test_covered_fedra_leaves_no_block_empty_among_the_participants() -> None:
    fedra = method("fedra", allocation="covered")
    for round in range(30):
        assert fedra.assign(np.array([2, 3]), round).held.any(axis=0).sum() == DEPTH


def test_prefix_gives_the_first_blocks_and_full_all() -> None:
    prefix = np.arange(DEPTH) < CAPACITIES[:, None]
    np.testing.assert_array_equal(method("fedit", allocation="prefix").assign(EVERYBODY, 0).held, prefix)
    assert method("fedit", allocation="full").assign(EVERYBODY, 0).held.all()


def test_drawn_capacities_change_from_round_to_round_and_come_from_those_there_are() -> None:
    fedra = method("fedra", drawn=True)
    depths = np.array([fedra.assign(EVERYBODY, round).held.sum(axis=1) for round in range(200)])
    assert set(np.unique(depths)) == set(CAPACITIES)
    assert (depths[0] != depths[1]).any()
    np.testing.assert_allclose(depths.mean(axis=0), CAPACITIES.mean(), atol=0.5)


def test_alllarge_trains_all_blocks() -> None:
    assert method("alllarge").assign(EVERYBODY, 0).held.all()
    assert method("alllarge").evaluated_model().blocks.tolist() == list(range(DEPTH))


def test_allsmall_trains_and_evaluates_the_smallest_prefix() -> None:
    expected = np.tile(np.arange(DEPTH) < 2, (len(EVERYBODY), 1))
    np.testing.assert_array_equal(method("allsmall").assign(EVERYBODY, 0).held, expected)
    assert method("allsmall").evaluated_model().blocks.tolist() == [0, 1]


def test_exclusivefl_leaves_out_who_cannot_hold_the_whole_model() -> None:
    held = method("exclusivefl").assign(EVERYBODY, 0).held
    assert held[0].all()
    assert not held[1:].any()


def test_inclusivefl_holds_prefixes() -> None:
    held = method("inclusivefl").assign(EVERYBODY, 0).held
    np.testing.assert_array_equal(held, np.arange(DEPTH) < CAPACITIES[:, None])


def test_depthfl_holds_whole_stretches_between_exits() -> None:
    assignment = method("depthfl", depthfl=DepthFLConfig(exit_every=2)).assign(EVERYBODY, 0)
    assert assignment.held.sum(axis=1).tolist() == [6, 4, 4, 2, 2, 2]
    assert assignment.exits == (1, 3, 5)
    assert [assignment.exits_of(row).tolist() for row in range(4)] == [[0, 1, 2], [0, 1], [0, 1], [0]]


@pytest.mark.parametrize("name", ["alllarge", "allsmall", "exclusivefl", "inclusivefl", "depthfl"])
def test_a_method_with_its_own_allocation_refuses_another(name: str) -> None:
    with pytest.raises(InputError, match=r"method\.allocation: found uniform .* expected null"):
        method(name, allocation="uniform")


@pytest.mark.parametrize("name", ["alllarge", "allsmall", "exclusivefl", "inclusivefl", "depthfl", "fedhello"])
def test_a_method_with_its_own_allocation_refuses_ranks(name: str) -> None:
    with pytest.raises(InputError, match=r"clients\.ranks: found ranks with method\.name"):
        method(name, ranks=CAPACITIES // 2)


@pytest.mark.parametrize("options", [{"name": "alllarge"}, {"name": "fedit", "allocation": "full"}])
def test_full_depth_beyond_every_client_needs_a_word(options: dict[str, str]) -> None:
    small = np.full(6, 4)
    with pytest.raises(InputError, match=r"clients\.capacities: found at most 4 of 6 blocks"):
        federation_method(small, **options)
    assert federation_method(small, ignore_capacities=True, **options).assign(EVERYBODY, 0).held.all()


def test_exclusivefl_without_a_capable_client_is_refused() -> None:
    with pytest.raises(InputError, match=r"clients\.capacities: found at most 4 of 6 blocks"):
        federation_method(np.full(6, 4), name="exclusivefl")


def test_reference_allocation_has_fixed_capacities() -> None:
    with pytest.raises(InputError, match=r"method\.allocation: found reference"):
        method("fedra", allocation="reference", drawn=True)


@pytest.mark.parametrize(("every", "capacity"), [(4, 6), (3, 2)])
def test_depthfl_needs_an_exit_that_somebody_reaches(every: int, capacity: int) -> None:
    with pytest.raises(InputError, match=r"method\.depthfl\.exit_every"):
        federation_method(np.full(6, capacity), name="depthfl", depthfl=DepthFLConfig(exit_every=every))


def test_an_unknown_method_is_refused_with_those_there_are() -> None:
    with pytest.raises(InputError, match=r"method\.name: found 'fedfoo', expected one of alllarge, allsmall, depthfl"):
        method("fedfoo")


def documented_sources() -> dict[str, str]:
    """The last column of the tables of methods in the documentation."""
    page = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
    rows = (line.strip("| ").split("|") for line in page.splitlines() if line.startswith("| `"))
    return {row[0].strip(" `"): row[-1].strip() for row in rows}


def test_every_method_is_documented_with_the_source_its_file_names() -> None:
    sources = documented_sources()
    assert sources.keys() == METHODS.keys()
    for name, source in sources.items():
        # Baselines are no paper of their own.
        expected = "FedRA, §4" if source in ("upper bound", "lower bound") else source
        assert expected in str(sys.modules[METHODS[name].__module__].__doc__), name


def federation_method(capacities, **options):
    return make_method(federation(capacities, **options))


@pytest.mark.parametrize(("ranks", "cautioned"), [(None, True), ([2] * 6, True), ([3, 2, 2, 3, 1, 2], False)])
def test_hetlora_cautions_when_all_ranks_are_equal(ranks: list[int] | None, cautioned: bool) -> None:
    made = federation_method(np.full(6, 6), name="hetlora", ranks=None if ranks is None else np.array(ranks))
    assert (made.caution is not None) == cautioned


def test_a_client_never_prunes_its_only_rank() -> None:
    assert not tail_mask(torch.tensor([1]), 0.99, 3).any()
    assert tail_mask(torch.tensor([3, 2]), 0.5, 3).tolist() == [[False, True, True], [False, True, False]]


def test_depthfl_predicts_by_the_exits_that_somebody_reaches() -> None:
    made = federation_method(np.full(6, 5), name="depthfl", depthfl=DepthFLConfig(exit_every=2))
    assert made.evaluated_model().exits == (1, 3)
    assert made.evaluated_model().blocks.tolist() == [0, 1, 2, 3]
    assert len(initial_state(made).heads) == 2


def test_a_participant_without_an_exit_is_reported() -> None:
    held = np.array([[True, False, False, False], [True, True, False, False], [False] * 4])
    with pytest.raises(ValueError, match=r"^exits: found a participant that holds blocks but none of \(1, 3\)"):
        Assignment(held, exits=(1, 3))
    Assignment(held[1:], exits=(1, 3))
