"""Every method's new global state against a few lines of NumPy."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from fedra_engine.config import DepthFLConfig, HetLoraConfig, InclusiveFLConfig, LoraFairConfig
from fedra_engine.methods.base import Method
from fedra_engine.methods.lorafair import Discrepancy, descend
from fedra_engine.methods.registry import make_method
from fedra_engine.models.state import GlobalState
from tests.methods.rounds import (
    CAPACITIES,
    DEPTH,
    EVERYBODY,
    LAYOUT,
    RANK,
    SCALE,
    Update,
    factors,
    federation,
    initial_state,
    method,
    packed,
    random_updates,
    run_round,
)

RANKS = np.array([3, 1, 2, 3, 1, 2])
LATE_RANKS = np.array([2, 1, 2, 3, 1, 2])
"""No client of the highest rank can hold all blocks."""
FULL_RANKS = np.full(6, RANK)


def weighted_mean(pairs):
    """Σ w v / Σ w of (w, v)."""
    return sum(w * v for w, v in pairs) / sum(w for w, _ in pairs)


def weight(update: Update, weighting: str) -> float:
    return float(update.samples) if weighting == "samples" else 1.0


def mean_adapters(state: GlobalState, updates: list[Update], weighting: str) -> np.ndarray:
    expected = state.adapters.numpy().copy()
    for block in range(DEPTH):
        holders = [(weight(u, weighting), u.adapters[block].numpy()) for u in updates if block in u.adapters]
        if holders:
            expected[block] = weighted_mean(holders)
    return expected


def rank_means(state: GlobalState, updates: list[Update], ranks: np.ndarray, weighting: str) -> torch.Tensor:
    """Each rank's row of A and column of B as the mean over the clients that have it."""
    expected = state.adapters.clone()
    for block in range(DEPTH):
        for target, (a, b) in enumerate(factors(expected[block])):
            for rank in range(RANK):
                those = [u for u in updates if block in u.adapters and ranks[u.client] > rank]
                if those:
                    pairs = [(weight(u, weighting), factors(u.adapters[block])[target]) for u in those]
                    a[rank] = weighted_mean([(w, own_a[rank]) for w, (own_a, _) in pairs])
                    b[:, rank] = weighted_mean([(w, own_b[:, rank]) for w, (_, own_b) in pairs])
    return expected


def mean_products(updates: list[Update], block: int, weighting: str) -> list[np.ndarray]:
    holders = [u for u in updates if block in u.adapters]
    return [
        weighted_mean([(weight(u, weighting), np.matmul(*factors(u.adapters[block])[t][::-1])) for u in holders])
        for t in range(len(LAYOUT.targets))
    ]


def make_made(deterministic: bool, **options) -> Method:
    return make_method(replace(federation(**options), deterministic=deterministic))


def columns(factor: str) -> slice:
    return LAYOUT.columns(factor)


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


@pytest.mark.parametrize("weighting", ["uniform", "samples"])
def test_fedhello_averages_over_the_clients_that_trained_a_block(weighting: str) -> None:
    made = method("fedhello", weighting=weighting)
    state, updates = initial_state(made), random_updates(made)
    trained = made.assign(EVERYBODY, 0).trained_blocks
    assert [sorted(update.adapters) for update in updates] == [np.flatnonzero(row).tolist() for row in trained]
    after = run_round(made, state, updates)
    np.testing.assert_allclose(after.adapters, mean_adapters(state, updates, weighting), atol=1e-12)


def test_fedsalora_averages_a_and_gives_everybody_its_own_b_back() -> None:
    made = method("fedsalora")
    state, updates = initial_state(made), random_updates(made)
    after = run_round(made, state, updates)
    expected = mean_adapters(state, updates, "uniform")
    np.testing.assert_allclose(after.adapters[:, columns("A")], expected[:, columns("A")], atol=1e-12)
    assert torch.equal(after.adapters[:, columns("B")], state.adapters[:, columns("B")])

    restored = method("fedsalora")
    restored.restore(made.tensors())
    for again in (made, restored):
        hand_out = again.assign(EVERYBODY, 1).hand_out
        for update in updates:
            slots = after.adapters.clone()
            hand_out(update.client, np.arange(DEPTH), slots)
            for block in range(DEPTH):
                own = update.adapters.get(block, after.adapters[block])
                assert torch.equal(slots[block, columns("B")], own[columns("B")])
                assert torch.equal(slots[block, columns("A")], after.adapters[block, columns("A")])


def test_fedsalora_evaluates_the_clients_of_each_domain() -> None:
    made = method("fedsalora")
    state, updates = initial_state(made), random_updates(made)
    after = run_round(made, state, updates)
    states = [list(of_domain) for of_domain in made.personal_states(after).values()]
    assert [len(of_domain) for of_domain in states] == [2, 2, 2]
    own = states[1][1].adapters
    for block, adapters in updates[3].adapters.items():
        assert torch.equal(own[block, columns("B")], adapters[columns("B")])


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


@pytest.mark.parametrize("beta", [0.0, 0.2])
def test_inclusivefl_passes_what_deeper_groups_learnt_to_shallower_ones(beta: float) -> None:
    made = method("inclusivefl", weighting="samples", inclusivefl=InclusiveFLConfig(momentum=beta))
    state = initial_state(made)
    momentum: dict[int, np.ndarray] = {}
    for round in range(3):
        updates = random_updates(made, round, EVERYBODY if round != 1 else np.array([1, 2, 4]))
        before = state.adapters.numpy()
        state = run_round(made, state, updates, round)
        change, mass = {}, {}
        for depth in sorted(set(CAPACITIES)):
            group = [u for u in updates if CAPACITIES[u.client] == depth]
            for block in range(depth if group else 0):
                change[depth, block] = weighted_mean([(u.samples, u.adapters[block].numpy()) for u in group])
                change[depth, block] = change[depth, block] - before[block]
                mass[depth, block] = sum(u.samples for u in group)
        distilled = dict(change)
        for depth, kept in momentum.items():
            if (depth, depth - 1) in change:
                distilled[depth, depth - 1] = beta * kept + (1 - beta) * change[depth, depth - 1]
        depths = sorted(set(CAPACITIES))
        for depth, deeper in pairwise(depths):
            if (deeper, 0) in change:
                momentum[depth] = np.mean([change[deeper, block] for block in range(depth - 1, deeper)], axis=0)
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


@pytest.mark.parametrize("ranks", [RANKS, LATE_RANKS])
@pytest.mark.parametrize("weighting", ["uniform", "samples"])
def test_hetlora_weighs_every_module_by_the_norm_of_its_product(weighting: str, ranks: np.ndarray) -> None:
    made = method("hetlora", ranks=ranks, weighting=weighting, hetlora=HetLoraConfig(kept_ranks=1.0))
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
    made = method("hetlora", ranks=RANKS, hetlora=HetLoraConfig(kept_ranks=0.7))
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
    made = method("hetlora", ranks=np.full(6, 2), hetlora=HetLoraConfig(kept_ranks=0.5))
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


def fair_objective(b: np.ndarray, mean_b: np.ndarray, a: np.ndarray, product: np.ndarray, weight: float) -> float:
    """LoRA-FAIR, eq. 8."""
    found = b @ a
    cosine = (found * product).sum() / (np.linalg.norm(found) * np.linalg.norm(product))
    return 1 - cosine + weight * ((b - mean_b) ** 2).sum()


@pytest.mark.parametrize("ranks", [FULL_RANKS, RANKS, LATE_RANKS])
def test_lorafair_descends_on_its_objective(ranks: np.ndarray) -> None:
    options = LoraFairConfig(weight=0.05, steps=3, lr=0.1)
    made = method("lorafair", weighting="samples", lorafair=options, ranks=ranks)
    state, updates = initial_state(made), random_updates(made)
    after = run_round(made, state, updates)
    mean = rank_means(state, updates, ranks, "samples")
    np.testing.assert_allclose(after.adapters[:, columns("A")], mean[:, columns("A")], atol=1e-12)
    for block in range(DEPTH):
        most = max(ranks[u.client] for u in updates if block in u.adapters)
        for target, product in enumerate(mean_products(updates, block, "samples")):
            whole_a, whole_b = factors(mean[block])[target]
            a, mean_b = torch.from_numpy(whole_a[:most]), torch.from_numpy(whole_b[:, :most])
            b, goal = mean_b.clone().requires_grad_(), torch.from_numpy(product)
            rate = options.lr / (a.square().sum() / (mean_b @ a).square().sum() + 2 * options.weight)
            for _ in range(options.steps):
                cosine = torch.cosine_similarity((b @ a).flatten(), goal.flatten(), dim=0)
                loss = 1 - cosine + options.weight * ((b - mean_b) ** 2).sum()
                (gradient,) = torch.autograd.grad(loss, b)
                b = (b - rate * gradient).detach().requires_grad_()
            found = factors(after.adapters[block])[target][1]
            np.testing.assert_allclose(found[:, :most], b.detach(), atol=1e-10)
            np.testing.assert_array_equal(found[:, most:], whole_b[:, most:])


def test_lorafair_comes_nearer_to_the_mean_product() -> None:
    made = method("lorafair")
    state, updates = initial_state(made), random_updates(made)
    after, mean = run_round(made, state, updates), mean_adapters(state, updates, "uniform")
    for block in range(DEPTH):
        for target, product in enumerate(mean_products(updates, block, "uniform")):
            a, mean_b = factors(torch.from_numpy(mean)[block])[target]
            b = factors(after.adapters[block])[target][1]
            assert fair_objective(b, mean_b, a, product, 0.01) < fair_objective(mean_b, mean_b, a, product, 0.01)


@pytest.mark.parametrize("weight", [1.0, 0.1, 0.01])
@pytest.mark.parametrize("scale", [1e-6, 0.1, 0.3, 10.0])
def test_lorafair_s_descent_is_stable(weight: float, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    b = scale * torch.randn(2, 300, 8, generator=generator, dtype=torch.float64)
    a = torch.randn(2, 8, 80, generator=generator, dtype=torch.float64)
    product = b @ a + scale * torch.randn(2, 300, 80, generator=generator, dtype=torch.float64)
    problem, objectives = Discrepancy.of(product, b, a), []
    for steps in (0, 1, 2, 20, 200, 400):
        z = descend(problem.gram_basis, problem.gram_a, problem.norm, weight=weight, steps=steps, lr=0.5)
        found = (problem.basis @ z).numpy()
        objectives.append(sum(map(fair_objective, found, b.numpy(), a.numpy(), product.numpy(), [weight] * 2)))
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in pairwise(objectives))
    assert objectives[-2] - objectives[-1] <= 1e-3 * (objectives[0] - objectives[-1]) + 1e-12


def test_lorafair_leaves_a_zero_product_alone() -> None:
    b, a = torch.zeros(2, 4, 3), torch.randn(2, 3, 5)
    problem = Discrepancy.of(torch.zeros(2, 4, 5), b, a)
    found = descend(problem.gram_basis, problem.gram_a, problem.norm, weight=0.01, steps=5, lr=0.1)
    assert torch.equal(problem.basis @ found, b)
