"""LoRA-FAIR's correction of B, against autograd."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from fedra_engine.config import LoraFairConfig
from fedra_engine.methods.lorafair import coordinates, descend
from fedra_engine.methods.registry import make_method
from fedra_engine.models.adapters import AdapterLayout
from tests.methods.expected import FULL_RANKS, LATE_RANKS, RANKS, columns, mean_adapters, mean_products, rank_means
from tests.methods.rounds import (
    DEPTH,
    LAYOUT,
    factors,
    federation,
    initial_state,
    method,
    random_updates,
    run_round,
)


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


def test_lorafair_corrects_targets_of_several_ranks_as_each_alone() -> None:
    layout = AdapterLayout(tuple(replace(t, rank=rank) for t, rank in zip(LAYOUT.targets, (3, 1, 3), strict=True)))
    together = make_method(replace(federation(name="lorafair"), layout=layout))
    state, updates = initial_state(together), random_updates(together)
    after = run_round(together, state, updates)
    for index, target in enumerate(layout.targets):
        alone = make_method(replace(federation(name="lorafair"), layout=AdapterLayout((target,))))

        def own(slots: Tensor, index: int = index) -> Tensor:
            return torch.cat([layout.lora_a(slots, index).flatten(-2), layout.lora_b(slots, index).flatten(-2)], -1)

        own_updates = [replace(u, adapters={block: own(slot) for block, slot in u.adapters.items()}) for u in updates]
        expected = run_round(alone, replace(state, adapters=own(state.adapters)), own_updates)
        torch.testing.assert_close(own(after.adapters), expected.adapters)


@pytest.mark.parametrize("weight", [1.0, 0.1, 0.01])
@pytest.mark.parametrize("scale", [1e-6, 0.1, 0.3, 10.0])
def test_lorafair_s_descent_is_stable(weight: float, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    b = scale * torch.randn(2, 300, 8, generator=generator, dtype=torch.float64)
    a = torch.randn(2, 8, 80, generator=generator, dtype=torch.float64)
    product = b @ a + scale * torch.randn(2, 300, 80, generator=generator, dtype=torch.float64)
    (basis, *problem), objectives = coordinates(product, b, a), []
    for steps in (0, 1, 2, 20, 200, 400):
        z = descend(*problem, weight=weight, steps=steps, lr=0.5)
        found = (basis @ z).numpy()
        objectives.append(sum(map(fair_objective, found, b.numpy(), a.numpy(), product.numpy(), [weight] * 2)))
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in pairwise(objectives))
    assert objectives[-2] - objectives[-1] <= 1e-3 * (objectives[0] - objectives[-1]) + 1e-12


def test_lorafair_leaves_a_zero_product_alone() -> None:
    b, a = torch.zeros(2, 4, 3), torch.randn(2, 3, 5)
    basis, *problem = coordinates(torch.zeros(2, 4, 5), b, a)
    assert torch.equal(basis @ descend(*problem, weight=0.01, steps=5, lr=0.1), b)
