"""InclusiveFL's momentum distillation, against NumPy."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from fedra_engine.config import InclusiveFLConfig
from tests.methods.expected import mean_adapters, weighted_mean
from tests.methods.rounds import CAPACITIES, DEPTH, EVERYBODY, initial_state, method, random_updates, run_round


@pytest.mark.parametrize(("beta", "adapted"), [(0.0, range(DEPTH)), (0.2, range(DEPTH)), (0.2, [2, 4, 5])])
def test_inclusivefl_passes_what_deeper_groups_learnt_to_shallower_ones(beta: float, adapted: Collection[int]) -> None:
    """Also where only some blocks have adapters."""
    made = method("inclusivefl", weighting="samples", inclusivefl=InclusiveFLConfig(momentum=beta))
    state = initial_state(made)
    momentum: dict[int, np.ndarray] = {}
    for round in range(3):
        updates = random_updates(made, round, EVERYBODY if round != 1 else np.array([1, 2, 4]))
        updates = [replace(u, adapters={b: slot for b, slot in u.adapters.items() if b in adapted}) for u in updates]
        before = state.adapters.numpy()
        state = run_round(made, state, updates, round)
        change, mass = {}, {}
        for depth in sorted(set(CAPACITIES)):
            group = [u for u in updates if CAPACITIES[u.client] == depth]
            for block in (block for block in adapted if group and block < depth):
                change[depth, block] = weighted_mean([(u.samples, u.adapters[block].numpy()) for u in group])
                change[depth, block] = change[depth, block] - before[block]
                mass[depth, block] = sum(u.samples for u in group)
        distilled = dict(change)
        for depth, kept in momentum.items():
            if (depth, depth - 1) in change:
                distilled[depth, depth - 1] = beta * kept + (1 - beta) * change[depth, depth - 1]
        depths = sorted(set(CAPACITIES))
        for depth, deeper in pairwise(depths):
            learnt = [change[deeper, block] for block in range(depth - 1, deeper) if (deeper, block) in change]
            if learnt:
                momentum[depth] = np.mean(learnt, axis=0)
        for block in range(DEPTH):
            holders = [(mass[key], distilled[key]) for key in distilled if key[1] == block]
            expected = before[block] + (weighted_mean(holders) if holders else 0)
            np.testing.assert_allclose(state.adapters[block], expected, atol=1e-12)


def test_inclusivefl_goes_on_after_a_restart() -> None:
    def after_two(restart: bool) -> torch.Tensor:
        made = method("inclusivefl")
        state = run_round(made, initial_state(made), random_updates(made), 0)
        if restart:
            tensors, made = made.tensors(), method("inclusivefl")
            made.restore(tensors)
        return run_round(made, state, random_updates(made, 1), 1).adapters

    assert torch.equal(after_two(False), after_two(True))


def test_without_momentum_every_block_is_the_plain_mean_over_its_holders() -> None:
    made = method("inclusivefl", inclusivefl=InclusiveFLConfig(momentum=0))
    state = initial_state(made)
    for round in range(2):
        updates = random_updates(made, round)
        expected = mean_adapters(state, updates, "uniform")
        heads = np.mean([update.heads[0].numpy() for update in updates], axis=0)
        state = run_round(made, state, updates, round)
        np.testing.assert_allclose(state.adapters, expected, atol=1e-12)
        np.testing.assert_allclose(state.heads[0], heads, atol=1e-12)


def test_inclusivefl_holds_prefixes() -> None:
    held = method("inclusivefl").assign(EVERYBODY, 0).held
    np.testing.assert_array_equal(held, np.arange(DEPTH) < CAPACITIES[:, None])
