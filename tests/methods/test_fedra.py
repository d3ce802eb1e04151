"""Which blocks clients hold under each allocation."""

from __future__ import annotations

import numpy as np
import pytest

from fedra_engine.methods.allocators import ALLOCATORS
from fedra_engine.runtime.errors import InputError
from tests.methods.rounds import CAPACITIES, DEPTH, EVERYBODY, method

RANDOM = ["fedra", "fedit", "ffalora", "fedsalora", "flora", "flexlora", "fedexlora"]


@pytest.mark.parametrize("name", RANDOM)
@pytest.mark.parametrize("allocation", [None, "uniform", "reference", "covered", "first", "ends", "rotated"])
def test_random_allocation_gives_each_client_its_capacity_anew_every_round(name: str, allocation: str | None) -> None:
    made = method(name, allocation=allocation)
    first, second = (made.assign(EVERYBODY, round).held for round in range(2))
    np.testing.assert_array_equal(first.sum(axis=1), CAPACITIES)
    np.testing.assert_array_equal(second.sum(axis=1), CAPACITIES)
    assert (first != second).any()


@pytest.mark.parametrize("allocation", sorted(ALLOCATORS.keys() - {"covered"}))
def test_a_clients_row_does_not_depend_on_who_else_takes_part(allocation: str) -> None:
    fedra = method("fedra", allocation=allocation)
    participants = np.array([1, 4])
    np.testing.assert_array_equal(fedra.assign(participants, 3).held, fedra.assign(EVERYBODY, 3).held[participants])


def test_covered_fedra_leaves_no_block_empty_among_the_participants() -> None:
    fedra = method("fedra", allocation="covered")
    for round in range(30):
        assert fedra.assign(np.array([2, 3]), round).held.any(axis=0).sum() == DEPTH


def test_prefix_gives_the_first_blocks_and_full_all() -> None:
    prefix = np.arange(DEPTH) < CAPACITIES[:, None]
    np.testing.assert_array_equal(method("fedit", allocation="prefix").assign(EVERYBODY, 0).held, prefix)
    assert method("fedit", allocation="full").assign(EVERYBODY, 0).held.all()


def test_reference_allocation_has_fixed_capacities() -> None:
    with pytest.raises(InputError, match=r"method\.allocation: found reference"):
        method("fedra", allocation="reference", drawn=True)
