"""The sweep gives every client exactly the update its own sub-model would give it, trained alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fedra_engine.config import TrainingConfig
from fedra_engine.execution.work import LocalWork
from fedra_engine.federation.allocation import uniform_allocation
from tests.tiny import DEPTH
from tests.tiny_federation import ADAMW, SGD, Setting, make_setting


def relative_change_error(found: Tensor, expected: Tensor, before: Tensor) -> float:
    """Largest error of the change, over its largest entry."""
    return float((found - expected).abs().max() / (expected - before).abs().max())


def assert_same_updates(setting: Setting, lanes: int, rounds: int, tolerance: float) -> None:
    expected, expected_state = setting.rounds(None, rounds)
    found, found_state = setting.rounds(lanes, rounds)
    before = setting.state()
    for found_round, expected_round in zip(found, expected, strict=True):
        assert found_round.keys() == expected_round.keys() == set(range(len(setting.clients)))
    allocation = uniform_allocation(setting.clients.capacities, DEPTH, np.random.default_rng(0))
    for client, (adapters, head) in expected[0].items():
        blocks = np.flatnonzero(allocation[client])
        assert relative_change_error(found[0][client][0], adapters, before.adapters[blocks]) <= tolerance
        assert relative_change_error(found[0][client][1], head, before.head) <= tolerance
    assert relative_change_error(found_state.adapters, expected_state.adapters, before.adapters) <= tolerance
    assert relative_change_error(found_state.head, expected_state.head, before.head) <= tolerance


@pytest.mark.parametrize("family", ["vit", "dinov2", "bert"])
@pytest.mark.parametrize(("training", "dropout"), [(SGD, 0.0), (SGD, 0.3), (ADAMW, 0.3)])
def test_sweep_equals_sequential_in_float64(family: str, training: TrainingConfig, dropout: float) -> None:
    assert_same_updates(make_setting(family, training, dropout=dropout), lanes=3, rounds=3, tolerance=1e-8)


@pytest.mark.parametrize("lanes", [1, 2, 4, 6, 50])
def test_lane_count_does_not_change_updates(lanes: int) -> None:
    assert_same_updates(make_setting("vit", SGD, dropout=0.3), lanes=lanes, rounds=1, tolerance=1e-8)


@pytest.mark.parametrize("family", ["vit", "dinov2", "bert"])
def test_float32_values_agree_after_sgd(family: str) -> None:
    setting = make_setting(family, SGD, dropout=0.3, dtype=torch.float32)
    (expected,), (found,) = setting.rounds(None, 1)[0], setting.rounds(3, 1)[0]
    for client, tensors in expected.items():
        for value, reference in zip(found[client], tensors, strict=True):
            assert (value - reference).abs().max() <= 1e-5 * reference.abs().max()


@pytest.mark.parametrize("family", ["vit", "dinov2", "bert"])
def test_float32_gradients_of_the_first_step_agree(family: str) -> None:
    # One step of plain SGD at so high a rate leaves the gradient alone, free of the rounding of the parameters.
    one_step = TrainingConfig(lr=1e4, momentum=0.0, weight_decay=0.0, clip_norm=None, batch_size=4, max_local_steps=1)
    setting = make_setting(family, one_step, dtype=torch.float32)
    before = setting.state()
    allocation = uniform_allocation(setting.clients.capacities, DEPTH, np.random.default_rng(0))
    (expected,), (found,) = setting.rounds(None, 1)[0], setting.rounds(3, 1)[0]
    for client, (adapters, head) in expected.items():
        blocks = np.flatnonzero(allocation[client])
        assert relative_change_error(found[client][0], adapters, before.adapters[blocks]) <= 1e-5
        assert relative_change_error(found[client][1], head, before.head) <= 1e-5


def test_a_client_alone_gets_the_update_it_gets_among_others() -> None:
    setting = make_setting("vit", ADAMW, dropout=0.3)
    among = setting.rounds(6, 1)[0][0]
    state, executor = setting.state(), setting.executor(6)
    allocation = uniform_allocation(setting.clients.capacities, DEPTH, np.random.default_rng(0))
    for client in range(len(setting.clients)):
        alone = np.array([client])
        work = LocalWork(setting.clients, alone, ADAMW, seed=3, round=0, lr=ADAMW.lr)
        (update,) = executor.train(work, allocation[alone], state)
        blocks = np.flatnonzero(allocation[client])
        found = update.adapters[update.slots]
        assert relative_change_error(found, among[client][0], state.adapters[blocks]) <= 1e-8


def test_reported_losses_and_counts_agree() -> None:
    setting = make_setting("vit", ADAMW, dropout=0.3)
    allocation = uniform_allocation(setting.clients.capacities, DEPTH, np.random.default_rng(0))
    work = LocalWork(setting.clients, np.arange(len(setting.clients)), ADAMW, seed=3, round=0, lr=ADAMW.lr)

    def reported(lanes: int | None) -> dict[int, tuple[int, int, float]]:
        return {
            int(client): (int(samples), int(processed), float(loss))
            for update in setting.executor(lanes).train(work, allocation, setting.state())
            for client, samples, processed, loss in zip(
                update.clients, update.samples, update.processed, update.losses, strict=True
            )
        }

    expected, found = reported(None), reported(4)
    assert found.keys() == expected.keys()
    for client, (samples, processed, loss) in expected.items():
        assert found[client][:2] == (samples, processed)
        assert found[client][2] == pytest.approx(loss, rel=1e-10)
