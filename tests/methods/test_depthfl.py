"""DepthFL's exits and their distillation, against NumPy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from fedra_engine.config import DepthFLConfig, ExperimentConfig, MethodConfig
from fedra_engine.config.validation import validate
from fedra_engine.costs.model import parameters_of
from fedra_engine.federation.work import LocalWork
from fedra_engine.methods.registry import make_method
from fedra_engine.models.foundation import cut_to_blocks, replace_module
from fedra_engine.models.state import GlobalState
from fedra_engine.runtime.errors import InputError
from tests.methods.expected import mean_adapters
from tests.methods.rounds import (
    CAPACITIES,
    DEPTH,
    EVERYBODY,
    federation,
    initial_state,
    method,
    random_updates,
    run_round,
)
from tests.tiny import make_samples
from tests.tiny_federation import SAMPLE_COUNTS, SGD, make_setting


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


def test_depthfl_holds_whole_stretches_between_exits() -> None:
    assignment = method("depthfl", depthfl=DepthFLConfig(exit_every=2)).assign(EVERYBODY, 0)
    assert assignment.held.sum(axis=1).tolist() == [6, 4, 4, 2, 2, 2]
    assert assignment.exits == (1, 3, 5)
    assert [assignment.exits_of(row).tolist() for row in range(4)] == [[0, 1, 2], [0, 1], [0, 1], [0]]


@pytest.mark.parametrize(("every", "capacity"), [(4, 6), (3, 2)])
def test_depthfl_needs_an_exit_that_somebody_reaches(every: int, capacity: int) -> None:
    with pytest.raises(InputError, match=r"method\.depthfl\.exit_every"):
        method("depthfl", capacities=np.full(6, capacity), depthfl=DepthFLConfig(exit_every=every))


def test_depthfl_predicts_by_the_exits_that_somebody_reaches() -> None:
    made = method("depthfl", capacities=np.full(6, 5), depthfl=DepthFLConfig(exit_every=2))
    assert made.evaluated_model().exits == (1, 3)
    assert made.evaluated_model().blocks.tolist() == [0, 1, 2, 3]
    assert len(initial_state(made).heads) == 2


def as_fedra_ran_it(**options: int) -> DepthFLConfig:
    return DepthFLConfig(variant="fedra_paper", **options)


def test_as_fedra_ran_it_exits_follow_the_blocks_4_7_10_that_lie_before_a_clients_end() -> None:
    capacities = np.array([12, 10, 8, 7, 4, 3])
    known = federation(capacities, name="depthfl", depthfl=as_fedra_ran_it())
    made = make_method(replace(known, depth=12, adapted=np.ones(12, dtype=np.bool_)))
    assignment = made.assign(EVERYBODY, 0)
    np.testing.assert_array_equal(assignment.held, np.arange(12) < capacities[:, None])
    assert [block + 1 for block in assignment.exits] == [4, 7, 10]
    expected = [[exit < capacity for exit in (4, 7, 10)] + [True] for capacity in capacities]
    assert assignment.has_exit.tolist() == expected
    weights = [made.assign(EVERYBODY, round).distillation for round in (0, 99, 500, 600)]
    np.testing.assert_allclose(weights, np.exp(-5 * (1 - np.array([0, 99, 500, 500]) / 500) ** 2))


def test_as_fedra_ran_it_the_final_classifier_is_the_mean_over_all_and_the_whole_model_predicts_by_it() -> None:
    # Exits after blocks 3 and 5, counted from 1.
    made = method("depthfl", depthfl=as_fedra_ran_it(exit_every=2))
    state, updates = initial_state(made), random_updates(made)
    after = run_round(made, state, updates)
    np.testing.assert_allclose(after.adapters, mean_adapters(state, updates, "uniform"), atol=1e-12)
    for exit, holders in enumerate([CAPACITIES > 3, CAPACITIES > 5, CAPACITIES > 0]):
        expected = np.mean([updates[client].heads[exit].numpy() for client in np.flatnonzero(holders)], axis=0)
        np.testing.assert_allclose(after.heads[exit], expected, atol=1e-12)
    assert len(after.heads) == 3
    assert made.evaluated_model().blocks.tolist() == list(range(DEPTH))
    assert made.evaluated_model().exits == ()
    # It need not divide the depth.
    assert method("depthfl", depthfl=as_fedra_ran_it(exit_every=4)).assign(EVERYBODY, 0).exits == (4,)


def test_as_fedra_ran_it_a_client_minimises_cross_entropies_and_the_distillation_between_them() -> None:
    setting = make_setting("vit", replace(SGD, batch_size=16, max_local_steps=1))
    foundation, round = setting.foundation, 300
    known = federation(name="depthfl", depthfl=as_fedra_ran_it(exit_every=1))
    made = make_method(replace(known, clients=setting.clients, depth=foundation.depth))
    start = setting.state()
    # With B = 0 adapters change nothing; exits differ, as in later rounds.
    state = made.initial_state(GlobalState(torch.zeros_like(start.adapters), start.heads), lambda: ())
    state = replace(state, heads=state.heads + torch.randn_like(state.heads))
    work = LocalWork(setting.clients, EVERYBODY, setting.training, seed=3, round=round, lr=0.1)
    losses = {}
    for updates in setting.executor(6).train(work, made.assign(EVERYBODY, round), state):
        losses |= dict(zip(updates.clients.tolist(), updates.losses.tolist(), strict=True))
    samples, layout = make_samples("vit", sum(SAMPLE_COUNTS)), foundation.head_layout
    for client, capacity in enumerate(setting.clients.capacities):
        batch = samples.batch(torch.from_numpy(work.batches(client)[0]), foundation.device, foundation.dtype)
        labels, log_p = batch.labels.numpy(), []
        for depth, head in [*((d, d - 2) for d in (2, 3) if d < capacity), (capacity, 2)]:
            model = cut_to_blocks(foundation, range(depth))
            replace_module(model, foundation.head_path, nn.Identity())
            features = model(**batch.inputs).logits
            logits = linear(features, layout.weight(state.heads[head]), layout.bias(state.heads[head]))
            log_p.append(logits.log_softmax(1).detach().numpy())
        rows, weight = np.arange(len(labels)), np.exp(-5 * (1 - round / 500) ** 2)
        expected = -sum(own[rows, labels].mean() for own in log_p)
        for student in log_p:
            for teacher in log_p:
                divergence = (np.exp(teacher) * (teacher - student)).sum(1).mean()
                expected += weight / max(len(log_p) - 1, 1) * divergence
        assert losses[client] == pytest.approx(expected * len(labels), rel=1e-10), client


def test_as_fedra_ran_it_costs_count_every_classifier_of_a_client() -> None:
    foundation = replace(make_setting("vit", SGD).foundation, adapted=np.ones(DEPTH, dtype=np.bool_))
    assignment = method("depthfl", depthfl=as_fedra_ran_it(exit_every=2)).assign(EVERYBODY, 0)
    blocks, heads = foundation.adapter_layout.size, foundation.head_layout.trained_size
    found = parameters_of(assignment.held, assignment, "both", foundation)
    assert found.tolist() == [c * blocks + h * heads for c, h in zip(CAPACITIES, [3, 2, 2, 1, 1, 1], strict=True)]


@pytest.mark.parametrize(("every", "capacity"), [(5, 6), (3, 4)])
def test_as_fedra_ran_it_needs_an_exit_before_the_end_of_a_client(every: int, capacity: int) -> None:
    with pytest.raises(InputError, match=r"method\.depthfl\.exit_every"):
        method("depthfl", capacities=np.full(6, capacity), depthfl=as_fedra_ran_it(exit_every=every))


def test_as_fedra_ran_it_there_is_nothing_to_predict_by_but_the_final_classifier() -> None:
    options = replace(as_fedra_ran_it(), predict="last")
    with pytest.raises(
        InputError, match=r"method\.depthfl\.predict: found 'last' with method\.depthfl\.variant fedra_paper"
    ):
        validate(ExperimentConfig(method=MethodConfig("depthfl", depthfl=options)))
