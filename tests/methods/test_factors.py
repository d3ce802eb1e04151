"""Methods that train one factor at a time."""

from __future__ import annotations

import numpy as np

from tests.methods.expected import columns, mean_adapters
from tests.methods.rounds import EVERYBODY, initial_state, method, random_updates, run_round


def test_ffalora_trains_b_alone_and_averages_it() -> None:
    made = method("ffalora")
    assert made.assign(EVERYBODY, 0).factors == "B"
    state, updates = initial_state(made), random_updates(made)
    mean = mean_adapters(state, updates, "uniform")
    after = run_round(made, state, updates).adapters
    np.testing.assert_allclose(after[:, columns("B")], mean[:, columns("B")], atol=1e-12)


def test_rolora_trains_b_first_and_then_a() -> None:
    rolora = method("rolora")
    assert [rolora.assign(EVERYBODY, round).factors for round in range(4)] == ["B", "A", "B", "A"]
    for round, factor in enumerate(["B", "A"]):
        state, updates = initial_state(rolora), random_updates(rolora, round)
        mean = mean_adapters(state, updates, "uniform")
        after = run_round(rolora, state, updates, round).adapters
        np.testing.assert_allclose(after[:, columns(factor)], mean[:, columns(factor)], atol=1e-12)
