from __future__ import annotations

import numpy as np
import pytest

from fedra_engine.config import MethodConfig
from fedra_engine.errors import InputError
from fedra_engine.federation.clients import Clients
from fedra_engine.methods.base import Federation
from fedra_engine.methods.registry import make_method
from fedra_engine.models.adapters import AdapterLayout, Target

CAPACITIES = np.array([6, 5, 4, 3, 2, 2])
DEPTH = 6
CLIENTS = Clients([np.arange(3)] * 6, np.arange(6), CAPACITIES)
LAYOUT = AdapterLayout((Target("fc", 3, 4),), rank=2)
EVERYBODY = np.arange(6)


def method(name: str, allocation: str | None = None):
    config = MethodConfig(name=name, allocation=allocation)
    return make_method(Federation(config, CLIENTS, DEPTH, LAYOUT, scale=2.0, seed=0))


@pytest.mark.parametrize("allocation", ["uniform", "reference", "covered"])
def test_fedra_gives_each_client_its_capacity_anew_every_round(allocation: str) -> None:
    fedra = method("fedra", allocation)
    first, second = (fedra.assign(EVERYBODY, round).held for round in range(2))
    np.testing.assert_array_equal(first.sum(axis=1), CAPACITIES)
    np.testing.assert_array_equal(second.sum(axis=1), CAPACITIES)
    assert (first != second).any()


@pytest.mark.parametrize("allocation", ["uniform", "reference"])
def test_a_clients_row_does_not_depend_on_who_else_takes_part(allocation: str) -> None:
    fedra = method("fedra", allocation)
    some = np.array([1, 4])
    np.testing.assert_array_equal(fedra.allocate(some, 3), fedra.assign(EVERYBODY, 3).held[some])


def test_covered_fedra_leaves_no_block_empty_among_the_participants() -> None:
    fedra = method("fedra", "covered")
    for round in range(30):
        assert fedra.assign(np.array([2, 3]), round).held.any(axis=0).sum() == DEPTH


def test_alllarge_trains_all_blocks() -> None:
    assert method("alllarge").assign(EVERYBODY, 0).held.all()
    assert method("alllarge").evaluated_model().blocks.tolist() == list(range(DEPTH))


def test_allsmall_trains_and_evaluates_the_smallest_prefix() -> None:
    np.testing.assert_array_equal(
        method("allsmall").assign(EVERYBODY, 0).held, np.tile(np.arange(DEPTH) < 2, (len(EVERYBODY), 1))
    )
    assert method("allsmall").evaluated_model().blocks.tolist() == [0, 1]


def test_an_unknown_method_is_refused_with_those_there_are() -> None:
    with pytest.raises(InputError, match=r"method\.name: found 'fedfoo', expected one of fedra, alllarge, allsmall"):
        method("fedfoo")
