"""DepthFL's exits and their distillation, against NumPy."""

from __future__ import annotations

import numpy as np

from fedra_engine.config import DepthFLConfig
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
