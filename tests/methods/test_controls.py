"""Methods of one depth for all."""

from __future__ import annotations

import numpy as np
import pytest

from fedra_engine.runtime.errors import InputError
from tests.methods.rounds import DEPTH, EVERYBODY, method


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


def test_exclusivefl_without_a_capable_client_is_refused() -> None:
    with pytest.raises(InputError, match=r"clients\.capacities: found at most 4 of 6 blocks"):
        method("exclusivefl", capacities=np.full(6, 4))
