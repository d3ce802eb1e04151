"""Means over a block's holders, and over the clients that have a rank, against NumPy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedra_engine.methods.base import Method
from fedra_engine.methods.registry import make_method
from tests.methods.expected import LATE_RANKS, RANKS, columns, mean_adapters, rank_means, weight, weighted_mean
from tests.methods.rounds import (
    DEPTH,
    EVERYBODY,
    LAYOUT,
    RANK,
    federation,
    initial_state,
    method,
    packed,
    random_updates,
    run_round,
)


def make_made(deterministic: bool, **options) -> Method:
    return make_method(replace(federation(**options), deterministic=deterministic))


@pytest.mark.parametrize("weighting", ["uniform", "samples"])
@pytest.mark.parametrize("name", ["fedra", "alllarge", "allsmall", "fedit", "exclusivefl"])
def test_means_over_the_holders_of_each_block(name: str, weighting: str) -> None:
    made = method(name, weighting=weighting)
    state, updates = initial_state(made), random_updates(made)
    after = run_round(made, state, updates)
    np.testing.assert_allclose(after.adapters, mean_adapters(state, updates, weighting), atol=1e-12)
    heads = weighted_mean([(weight(u, weighting), u.heads[0].numpy()) for u in updates])
    np.testing.assert_allclose(after.heads[0], heads, atol=1e-12)


@pytest.mark.parametrize("weighting", ["uniform", "samples"])
@pytest.mark.parametrize("ranks", [RANKS, LATE_RANKS])
@pytest.mark.parametrize(
    ("name", "averaged"), [("fedra", "both"), ("fedit", "both"), ("fedsalora", "A"), ("ffalora", "B"), ("rolora", "B")]
)
def test_each_rank_is_averaged_over_the_clients_that_have_it(
    name: str, averaged: str, ranks: np.ndarray, weighting: str
) -> None:
    made = method(name, ranks=ranks, weighting=weighting)
    state, updates = initial_state(made), random_updates(made)
    after = run_round(made, state, updates).adapters[:, columns(averaged)]
    np.testing.assert_allclose(after, rank_means(state, updates, ranks, weighting)[:, columns(averaged)], atol=1e-12)


@pytest.mark.parametrize("name", ["fedra", "hetlora"])
@pytest.mark.parametrize("participants", [EVERYBODY, np.array([1, 2]), np.array([1, 4])])
def test_what_was_trained_are_the_ranks_that_a_blocks_clients_have(name: str, participants: np.ndarray) -> None:
    made = method(name, ranks=RANKS)
    updates = random_updates(made, participants=participants)
    aggregator = made.aggregator(initial_state(made), 0)
    aggregator.add(packed(updates))
    found = aggregator.trained().expand(DEPTH, LAYOUT.size)
    for block in range(DEPTH):
        most = max((RANKS[u.client] for u in updates if block in u.adapters), default=0)
        trained = torch.ones(LAYOUT.size)
        LAYOUT.truncate(trained, int(most))
        assert torch.equal(found[block], trained > 0)


@pytest.mark.parametrize("deterministic", [False, True])
def test_full_ranks_change_nothing(deterministic: bool) -> None:
    plain, ranked = (
        make_made(name="fedra", ranks=ranks, deterministic=deterministic) for ranks in (None, np.full(6, RANK))
    )
    state, updates = initial_state(plain), random_updates(plain)
    assert torch.equal(run_round(plain, state, updates).adapters, run_round(ranked, state, updates).adapters)


def test_the_order_of_clients_of_several_ranks_is_bitwise_without_effect_where_asked() -> None:
    made = make_made(name="fedra", ranks=RANKS, deterministic=True, weighting="samples")
    state, updates = initial_state(made), random_updates(made)
    forward, backward = (run_round(made, state, order) for order in (updates, updates[::-1]))
    assert torch.equal(forward.adapters, backward.adapters)


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
