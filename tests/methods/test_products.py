"""Methods that average the products B·A, against NumPy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.methods.expected import FULL_RANKS, LATE_RANKS, RANKS, columns, mean_products, rank_means
from tests.methods.rounds import DEPTH, RANK, SCALE, factors, initial_state, method, random_updates, run_round


@pytest.mark.parametrize("ranks", [None, RANKS])
def test_flora_adds_the_exact_mean_product_to_the_model(ranks: np.ndarray | None) -> None:
    made = method("flora", weighting="samples", ranks=ranks)
    state, updates = initial_state(made), random_updates(made)
    after = run_round(made, state, updates)
    for block in range(DEPTH):
        for target, product in enumerate(mean_products(updates, block, "samples")):
            expected = state.base[target][block].numpy() + SCALE * product
            np.testing.assert_allclose(after.base[target][block], expected, atol=1e-12)
    assert not after.adapters[:, columns("B")].any()
    assert not torch.equal(after.adapters, run_round(made, state, updates, round=1).adapters)


def test_flora_is_the_product_of_the_stacked_factors() -> None:
    made = method("flora", weighting="samples")
    state, updates = initial_state(made), random_updates(made)
    after = run_round(made, state, updates)
    total = sum(u.samples for u in updates if 0 in u.adapters)
    stacked_b = np.hstack([factors(u.adapters[0])[1][1] for u in updates if 0 in u.adapters])
    stacked_a = np.vstack([u.samples / total * factors(u.adapters[0])[1][0] for u in updates if 0 in u.adapters])
    np.testing.assert_allclose(after.base[1][0] - state.base[1][0], SCALE * stacked_b @ stacked_a, atol=1e-12)


@pytest.mark.parametrize("ranks", [FULL_RANKS, RANKS, LATE_RANKS])
def test_fedexlora_makes_the_mean_of_the_clients_models(ranks: np.ndarray) -> None:
    made = method("fedexlora", weighting="samples", ranks=ranks)
    state, updates = initial_state(made), random_updates(made)
    after = run_round(made, state, updates)
    np.testing.assert_allclose(after.adapters, rank_means(state, updates, ranks, "samples"), atol=1e-12)
    for block in range(DEPTH):
        for target, product in enumerate(mean_products(updates, block, "samples")):
            a, b = factors(after.adapters[block])[target]
            whole = after.base[target][block].numpy() + SCALE * b @ a
            np.testing.assert_allclose(whole, state.base[target][block].numpy() + SCALE * product, atol=1e-12)


@pytest.mark.parametrize("ranks", [None, RANKS])
def test_flexlora_is_the_best_approximation_of_the_mean_product(ranks: np.ndarray | None) -> None:
    made = method("flexlora", weighting="samples", ranks=ranks)
    state, updates = initial_state(made), random_updates(made)
    after = run_round(made, state, updates)
    for block in range(DEPTH):
        for target, product in enumerate(mean_products(updates, block, "samples")):
            u, s, vt = np.linalg.svd(product)
            a, b = factors(after.adapters[block])[target]
            for rank in range(1, RANK + 1):
                best = (u[:, :rank] * s[:rank]) @ vt[:rank]
                np.testing.assert_allclose(b[:, :rank] @ a[:rank], best, atol=1e-10)


def test_the_largest_entry_of_flexloras_rows_of_a_is_positive() -> None:
    made = method("flexlora")
    after = run_round(made, initial_state(made), random_updates(made))
    for block in range(DEPTH):
        for a, _ in factors(after.adapters[block]):
            assert (a.max(axis=1) == np.abs(a).max(axis=1)).all()


@pytest.mark.parametrize("name", ["flora", "flexlora", "fedexlora"])
def test_products_of_a_block_nobody_trained_change_nothing(name: str) -> None:
    made = method(name)
    state = initial_state(made)
    updates = [replace(u, adapters={b: s for b, s in u.adapters.items() if b != 2}) for u in random_updates(made)]
    after = run_round(made, state, updates)
    for before, now in zip(state.base, after.base, strict=True):
        assert torch.equal(before[2], now[2])
        assert not torch.equal(before[3], now[3])
    if name != "flora":
        assert torch.equal(state.adapters[2], after.adapters[2])
