"""Who holds what, what gradients reach, and the proximal term."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedra_engine.config import TrainingConfig
from fedra_engine.federation.assignment import Assignment
from fedra_engine.federation.local_terms import BankRows, ClientAlone, ClientsInTraining, ProximalTerm, training_terms
from fedra_engine.models.adapters import AdapterLayout, Target

HELD = np.array([[1, 0, 1, 1], [1, 1, 0, 0]], dtype=bool)
TRAINED = np.array([[0, 0, 1, 0], [1, 0, 0, 0]], dtype=bool)


def test_all_held_blocks_are_trained_unless_said_otherwise() -> None:
    assert Assignment(HELD).trained_blocks.tolist() == HELD.tolist()
    assert Assignment(HELD, TRAINED).trained_blocks.tolist() == TRAINED.tolist()


def test_gradients_reach_from_the_first_trained_block_on() -> None:
    expected = [[False, False, True, True], [True, True, False, False]]
    assert Assignment(HELD, TRAINED).reached.tolist() == expected


def test_one_exit_after_the_last_block() -> None:
    assignment = Assignment(HELD)
    assert assignment.has_exit.sum(axis=1).tolist() == [1, 1]
    assert assignment.exits_of(1).tolist() == [0]


def test_participants_train_the_exits_that_they_reach() -> None:
    assignment = Assignment(HELD, exits=(0, 2))
    assert assignment.has_exit.sum(axis=1).tolist() == [2, 1]
    assert (assignment.exits_of(0).tolist(), assignment.exits_of(1).tolist()) == ([0, 1], [0])


def test_with_a_shared_end_only_exits_before_the_last_block_count() -> None:
    assignment = Assignment(HELD, exits=(0, 1), shared_end=True)
    assert assignment.has_exit.tolist() == [[True, False, True], [True, False, True]]
    assert assignment.select(np.array([1])).has_exit.tolist() == [[True, False, True]]
    assert Assignment(HELD[:, :1] | True, shared_end=True).has_exit.tolist() == [[True], [True]]


def test_blocks_without_an_exit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"none of \(2,\)"):
        Assignment(HELD, exits=(2,))
    assert Assignment(HELD & [[True], [False]], exits=(2,)).has_exit.sum(axis=1).tolist() == [1, 0]


def test_selected_participants_keep_what_is_theirs() -> None:
    one = Assignment(HELD, TRAINED, ranks=np.array([2, 3]), exits=(0,)).select(np.array([1]))
    assert one.held.tolist() == HELD[1:].tolist()
    assert one.trained is not None
    assert one.ranks is not None
    assert (one.trained.tolist(), one.ranks.tolist(), one.exits) == (TRAINED[1:].tolist(), [3], (0,))


def test_what_a_client_starts_with_is_handed_out_then_cut_to_its_rank() -> None:
    layout = AdapterLayout((Target("query", 1, 1, 3, 1.0),))
    given = list[tuple[int, list[int]]]()

    def hand_out(client: int, blocks: np.ndarray, slots: torch.Tensor) -> None:
        given.append((client, blocks.tolist()))
        slots.fill_(7)

    slots = torch.ones(2, layout.size)
    Assignment(HELD, ranks=np.array([3, 1]), hand_out=hand_out).make_own(1, 5, np.array([0, 1]), slots, layout)
    assert given == [(5, [0, 1])]
    for factor in (layout.lora_a(slots, 0), layout.lora_b(slots, 0)):
        assert factor.flatten(1).tolist() == [[7, 0, 0], [7, 0, 0]]


def test_the_proximal_gradient_is_that_of_its_loss() -> None:
    rng = torch.Generator().manual_seed(0)
    parameters, starts = (torch.randn(3, 4, generator=rng, dtype=torch.float64) for _ in range(2))
    parameters.requires_grad_()
    term = ProximalTerm(0.3)
    loss = term.loss(ClientAlone([parameters], [starts], []))
    assert loss.item() == pytest.approx(0.15 * float(((parameters.detach() - starts) ** 2).sum()))
    (expected,) = torch.autograd.grad(loss, parameters)
    banks = [
        BankRows(parameters.detach(), torch.ones(3, 4, dtype=torch.float64), starts, torch.arange(3)) for _ in range(2)
    ]
    layout = AdapterLayout((Target("query", 1, 1, 2, 1.0),))
    term.add_gradients(ClientsInTraining(*banks, ranks=torch.full((3,), 2), layout=layout))
    for bank in banks:
        torch.testing.assert_close(bank.gradients, 1 + expected)


def test_the_configuration_adds_a_proximal_term_if_asked() -> None:
    assert training_terms(TrainingConfig()) == ()
    assert training_terms(TrainingConfig(proximal_mu=0.1)) == (ProximalTerm(0.1),)


def test_a_participant_without_an_exit_is_reported() -> None:
    held = np.array([[True, False, False, False], [True, True, False, False], [False] * 4])
    with pytest.raises(ValueError, match=r"^exits: found a participant that holds blocks but none of \(1, 3\)"):
        Assignment(held, exits=(1, 3))
    Assignment(held[1:], exits=(1, 3))
