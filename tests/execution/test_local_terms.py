"""What a method adds to the local loss acts in the sweep as it does in a sub-model trained alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from fedra_engine.federation.assignment import Assignment
from fedra_engine.federation.local_terms import ClientAlone, ClientsInTraining, LocalTerm, ProximalTerm
from tests.execution.test_exactness import assert_same_change, assert_same_rounds
from tests.tiny_federation import ADAMW, SGD, make_setting

RANKS = np.array([3, 1, 2, 3, 1, 2])


@dataclass(frozen=True)
class DecayOfA(LocalTerm):
    """weight / 2 · Σ ‖A‖² over the adapters that a client trains."""

    weight: float

    def add_gradients(self, clients: ClientsInTraining) -> None:
        slots = clients.adapters.values
        change = torch.zeros_like(slots)
        for target in range(len(clients.layout.targets)):
            clients.layout.lora_a(change, target).copy_(self.weight * clients.layout.lora_a(slots, target))
        clients.adapters.add(change)

    def loss(self, client: ClientAlone) -> Tensor:
        return self.weight / 2 * torch.stack([a.square().sum() for a, _ in client.factors]).sum()


@dataclass(frozen=True)
class PullToStart(LocalTerm):
    """weight · r / 2 · ‖w − w₀‖² over the adapters that a client of rank r trains."""

    weight: float
    needs_starts = True

    def add_gradients(self, clients: ClientsInTraining) -> None:
        scale = self.weight * clients.ranks[:, None].to(clients.adapters.parameters.dtype)
        clients.adapters.add(scale * (clients.adapters.values - clients.adapters.starts[clients.adapters.rows]))

    def loss(self, client: ClientAlone) -> Tensor:
        # The classifier's weight and bias come last.
        pairs = list(zip(client.parameters, client.starts, strict=True))[:-2]
        rank = len(client.factors[0][0])
        return self.weight * rank / 2 * torch.stack([(p - start).square().sum() for p, start in pairs]).sum()


@pytest.mark.parametrize("term", [DecayOfA(0.3), PullToStart(0.2)], ids=["parameters", "ranks-and-starts"])
@pytest.mark.parametrize("asked", [{}, {"ranks": RANKS}, {"factors": "B"}], ids=["full", "ranks", "only-b"])
def test_a_made_up_term_acts_alike_in_both_executors(term: LocalTerm, asked: dict) -> None:
    setting = replace(make_setting("vit", SGD), assignment=lambda held: Assignment(held, terms=(term,), **asked))
    assert_same_rounds(setting, lanes=3, count=2, tolerance=1e-8)


def test_a_made_up_term_of_some_trained_blocks_goes_with_fedprox_and_adamw() -> None:
    def asked(held: np.ndarray) -> Assignment:
        return Assignment(np.ones_like(held), trained=held, terms=(DecayOfA(0.3),))

    setting = replace(make_setting("bert", replace(ADAMW, proximal_mu=0.5)), assignment=asked)
    assert_same_rounds(setting, lanes=4, count=2, tolerance=1e-8)


def test_a_term_changes_what_is_trained() -> None:
    setting = make_setting("vit", SGD)
    penalised = replace(setting, assignment=lambda held: Assignment(held, terms=(DecayOfA(0.3),)))
    (plain,), (found,) = setting.rounds(3), penalised.rounds(3)
    assert any((plain.after[name] != found.after[name]).any() for name in plain.after)


def test_fedprox_of_a_method_and_of_the_training_options_are_one() -> None:
    setting = make_setting("vit", replace(SGD, proximal_mu=0.7))
    method = replace(make_setting("vit", SGD), assignment=lambda held: Assignment(held, terms=(ProximalTerm(0.7),)))
    (expected,), (found,) = setting.rounds(3), method.rounds(3)
    assert_same_change(found.after, expected.after, expected.before, tolerance=0)
