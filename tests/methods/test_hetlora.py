"""HetLoRA's weights and pruning, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedra_engine.config import HetLoraConfig
from fedra_engine.federation.local_terms import BankRows, ClientAlone, ClientsInTraining
from fedra_engine.methods.hetlora import RankPenalty, product_norms, tail_mask
from tests.methods.expected import LATE_RANKS, RANKS, weight, weighted_mean
from tests.methods.rounds import DEPTH, EVERYBODY, LAYOUT, factors, initial_state, method, random_updates, run_round


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


@pytest.mark.parametrize(("ranks", "cautioned"), [(None, True), ([2] * 6, True), ([3, 2, 2, 3, 1, 2], False)])
def test_hetlora_cautions_when_all_ranks_are_equal(ranks: list[int] | None, cautioned: bool) -> None:
    made = method("hetlora", capacities=np.full(6, 6), ranks=None if ranks is None else np.array(ranks))
    assert (made.caution is not None) == cautioned


def test_a_client_never_prunes_its_only_rank() -> None:
    assert not tail_mask(torch.tensor([1]), 0.99, 3).any()
    assert tail_mask(torch.tensor([3, 2]), 0.5, 3).tolist() == [[False, True, True], [False, True, False]]


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_the_norms_of_products_are_those_of_the_products_themselves(size: float) -> None:
    slots = size * torch.from_numpy(np.random.default_rng(0).normal(size=(5, LAYOUT.size)))
    expected = [[np.linalg.norm(b @ a) for a, b in factors(slot)] for slot in slots]
    np.testing.assert_allclose(product_norms(slots, LAYOUT), expected, rtol=1e-9)


def test_the_gradient_of_the_penalty_is_that_of_its_loss() -> None:
    term, ranks = RankPenalty(keep_ratio=0.5, weight=0.3), torch.tensor([3, 2, 1])
    bank = torch.from_numpy(np.random.default_rng(0).normal(size=(4, LAYOUT.size)))
    rows = torch.tensor([3, 0, 2])
    for row, rank in zip(rows.tolist(), ranks.tolist(), strict=True):
        LAYOUT.truncate(bank[row], rank)
    gradients = torch.zeros_like(bank)
    adapters, heads = BankRows(bank, gradients, None, rows), BankRows(bank, gradients.clone(), None, rows)
    term.add_gradients(ClientsInTraining(adapters, heads, ranks, LAYOUT))

    slots = bank.clone().requires_grad_()
    targets, loss = range(len(LAYOUT.targets)), torch.zeros((), dtype=torch.float64)
    for row, rank in zip(rows.tolist(), ranks.tolist(), strict=True):
        mine = slots[row : row + 1]
        pairs = [
            (LAYOUT.lora_a(mine, target)[0, :rank], LAYOUT.lora_b(mine, target)[0, :, :rank]) for target in targets
        ]
        loss = loss + term.loss(ClientAlone([], [], pairs))
    (expected,) = torch.autograd.grad(loss, slots)
    torch.testing.assert_close(gradients, expected.nan_to_num(), rtol=1e-10, atol=1e-12)
    assert gradients[1].abs().sum() == 0 < gradients[3].abs().sum()
