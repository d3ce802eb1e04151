"""HetLoRA's weights and pruning, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from fedra_engine.config import HetLoraConfig
from tests.methods.expected import LATE_RANKS, RANKS, weight, weighted_mean
from tests.methods.rounds import DEPTH, EVERYBODY, factors, initial_state, method, random_updates, run_round


@pytest.mark.parametrize("ranks", [RANKS, LATE_RANKS])
@pytest.mark.parametrize("weighting", ["uniform", "samples"])
def test_hetlora_weighs_every_module_by_the_norm_of_its_product(weighting: str, ranks: np.ndarray) -> None:
    made = method("hetlora", ranks=ranks, weighting=weighting, hetlora=HetLoraConfig(keep_ratio=1.0))
    state, updates = initial_state(made), random_updates(made)
    after = run_round(made, state, updates)
    for block in range(DEPTH):
        holders = [u for u in updates if block in u.adapters]
        pairs = [factors(u.adapters[block]) for u in holders]
        clients = [weight(u, weighting) for u in holders]
        most = max(ranks[u.client] for u in holders)
        before = factors(state.adapters[block])
        for target, (a, b) in enumerate(factors(after.adapters[block])):
            products = [pair[target][1] @ pair[target][0] for pair in pairs]
            norms = [w * np.linalg.norm(product) for w, product in zip(clients, products, strict=True)]
            for found, index in ((a, 0), (b, 1)):
                mean = weighted_mean(list(zip(norms, (pair[target][index] for pair in pairs), strict=True)))
                beyond = (slice(most, None), slice(None)) if index == 0 else (slice(None), slice(most, None))
                mean[beyond] = before[target][index][beyond]
                np.testing.assert_allclose(found, mean, atol=1e-12)
    heads = weighted_mean([(weight(u, weighting), u.heads[0].numpy()) for u in updates])
    np.testing.assert_allclose(after.heads[0], heads, atol=1e-12)


def test_hetlora_prunes_clients_whose_last_ranks_shrank() -> None:
    made = method("hetlora", ranks=RANKS, hetlora=HetLoraConfig(keep_ratio=0.7))
    state, updates = initial_state(made), random_updates(made)
    # Client 0 (rank 3) returns a third rank next to nothing, client 3 (rank 3) a large one.
    for client, factor in ((0, 1e-6), (3, 1e3)):
        for slot in updates[client].adapters.values():
            for a, b in factors(slot):
                a[2:] *= factor
                b[:, 2:] *= factor
    full = made.assign(EVERYBODY, 0).ranks
    assert full.tolist() == RANKS.tolist()
    after = run_round(made, state, updates)
    ranks = made.assign(EVERYBODY, 1).ranks
    assert ranks[[0, 3]].tolist() == [2, 3]
    assert np.isfinite(after.adapters.numpy()).all()

    restored = method("hetlora", ranks=RANKS)
    restored.restore(made.tensors())
    assert restored.assign(EVERYBODY, 1).ranks.tolist() == ranks.tolist()


def test_what_hetlora_prunes_is_not_aggregated() -> None:
    made = method("hetlora", ranks=np.full(6, 2), hetlora=HetLoraConfig(keep_ratio=0.5))
    state = initial_state(made)
    (update,) = random_updates(made, participants=np.array([0]))
    for slot in update.adapters.values():
        for a, b in factors(slot):
            a[1:2] *= 1e-3
            b[:, 1:2] *= 1e-3
    after = run_round(made, state, [update])
    for block in update.adapters:
        for (a, b), (old_a, old_b) in zip(factors(after.adapters[block]), factors(state.adapters[block]), strict=True):
            np.testing.assert_array_equal(a[1:], old_a[1:])
            np.testing.assert_array_equal(b[:, 1:], old_b[:, 1:])
