"""What methods share: means over a block's holders and over the clients that have a rank, against NumPy; refusals."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedra_engine.methods.base import Method
from fedra_engine.methods.registry import make_method
from fedra_engine.runtime.errors import InputError
from tests.methods.expected import LATE_RANKS, RANKS, columns, mean_adapters, rank_means, weight, weighted_mean
from tests.methods.rounds import (
    CAPACITIES,
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


def test_drawn_capacities_change_from_round_to_round_and_come_from_those_there_are() -> None:
    fedra = method("fedra", drawn=True)
    depths = np.array([fedra.assign(EVERYBODY, round).held.sum(axis=1) for round in range(200)])
    assert set(np.unique(depths)) == set(CAPACITIES)
    assert (depths[0] != depths[1]).any()
    np.testing.assert_allclose(depths.mean(axis=0), CAPACITIES.mean(), atol=0.5)


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
        method(capacities=small, **options)
    assert method(capacities=small, ignore_capacities=True, **options).assign(EVERYBODY, 0).held.all()


@pytest.mark.parametrize("name", ["depthfl", "fedhello"])
def test_methods_that_need_the_logits_of_classes_refuse_language_models(name: str) -> None:
    assert make_method(federation(name=name)).evaluated_model().blocks[0] == 0
    with pytest.raises(InputError, match=rf"method\.name: found {name}.* with a causal language model, expected a"):
        make_method(replace(federation(name=name), trains_classifier=False))
