"""The sweep executor on its own: its steps, what it builds for them, and what it does when memory runs out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedra_engine.execution import sweep
from fedra_engine.execution.sweep import SweepExecutor
from fedra_engine.federation.assignment import Assignment
from fedra_engine.federation.work import LocalWork
from fedra_engine.models.state import GlobalState
from fedra_engine.runtime.errors import InputError
from fedra_engine.runtime.processes import Processes
from tests.execution.test_exactness import assert_same_change, assert_same_rounds
from tests.tiny_federation import ADAMW, SAMPLE_COUNTS, SGD, Setting, Tensors, make_setting

CLIENTS = np.arange(len(SAMPLE_COUNTS))


@pytest.fixture(scope="module")
def setting() -> Setting:
    return make_setting("vit", SGD, dropout=0.3)


@pytest.fixture(scope="module")
def executor(setting: Setting) -> SweepExecutor:
    made = setting.executor(3)
    assert isinstance(made, SweepExecutor)
    return made


@pytest.fixture(scope="module")
def expected(setting: Setting) -> dict[int, Tensors]:
    """Every client's update, trained alone in its sub-model."""
    return updates(setting, setting.executor(None))


def updates(setting: Setting, executor: Any, clients: np.ndarray = CLIENTS) -> dict[int, Tensors]:
    """What the executor gives for each client, which it gives once."""
    found: dict[int, Tensors] = {}
    for some in executor.train(*setting.work(0, clients), setting.state()):
        for position, client in enumerate(some.clients.tolist()):
            assert client not in found
            found[client] = setting.named(some.of_client(position), setting.state())
            assert float(some.losses[position]) > 0
    return found


def assert_same(setting: Setting, found: dict[int, Tensors], expected: dict[int, Tensors]) -> None:
    assert found.keys() == expected.keys()
    before = setting.named_state(setting.state())
    for client, tensors in expected.items():
        assert_same_change(found[client], tensors, before, 1e-8)


def test_every_client_gets_its_update_once(
    setting: Setting, executor: SweepExecutor, expected: dict[int, Tensors]
) -> None:
    assert_same(setting, updates(setting, executor), expected)


def test_a_round_after_another_or_after_half_of_one_gives_the_same_updates(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh, executor = updates(setting, setting.executor(3)), setting.executor(3)

    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        # As by Ctrl-C in a notebook: there are gradients of which no step was taken.
        patch.setattr(SweepExecutor, "_optimize", interrupt)
        with pytest.raises(KeyboardInterrupt):
            updates(setting, executor)
    for _ in range(2):
        for client, tensors in updates(setting, executor).items():
            assert all(torch.equal(tensors[name], value) for name, value in fresh[client].items())


def test_moments_are_corrected_by_the_steps_of_each_client() -> None:
    assert_same_rounds(make_setting("vit", ADAMW), lanes=2, count=1, tolerance=1e-8)


def test_a_head_that_is_shared_is_not_stepped() -> None:
    shared = make_setting("llama_lm", SGD)
    before = shared.foundation.head.weight.clone()
    found = updates(shared, shared.executor(3))
    assert_same(shared, found, updates(shared, shared.executor(None)))
    assert torch.equal(shared.foundation.head.weight, before)


def test_losses_are_means_of_batches_times_their_samples(setting: Setting, executor: SweepExecutor) -> None:
    def losses(of: Any) -> dict[int, float]:
        given = of.train(*setting.work(0, CLIENTS), setting.state())
        return {
            int(client): float(loss) for some in given for client, loss in zip(some.clients, some.losses, strict=True)
        }

    assert losses(executor) == pytest.approx(losses(setting.executor(None)), rel=1e-9)


def test_scaled_losses_give_the_same_updates(
    setting: Setting, executor: SweepExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = updates(setting, executor)
    scaled: list[float] = []
    backward = executor.model.backward
    monkeypatch.setattr(sweep, "loss_scale", lambda dtype: 1024.0)
    monkeypatch.setattr(executor.model, "backward", lambda loss: (scaled.append(float(loss.detach())), backward(loss)))
    found = updates(setting, executor)
    assert min(scaled) > 1024
    # A power of two rounds nothing.
    assert all(torch.equal(found[c][name], tensor) for c, tensors in plain.items() for name, tensor in tensors.items())


def test_tables_serve_until_lanes_or_batches_change(
    setting: Setting, executor: SweepExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, steps = [], []
    tables, step = sweep.StepTables, SweepExecutor._step
    monkeypatch.setattr(sweep, "StepTables", lambda *args, **options: (made.append(1), tables(*args, **options))[1])
    monkeypatch.setattr(SweepExecutor, "_step", lambda self, *args: (steps.append(1), step(self, *args))[1])
    # Twelve samples in batches of four, and seven: the last batch is ragged.
    updates(setting, executor, np.array([2]))
    assert (len(made), len(steps)) == (1, 3)
    updates(setting, executor, np.array([0]))
    assert (len(made), len(steps)) == (3, 5)


def test_tables_that_a_step_requested_are_those_of_the_last_one(setting: Setting, executor: SweepExecutor) -> None:
    updates(setting, executor, np.array([2]))
    key = (99, "filled", 0)
    executor._requested.blocks.add(key)
    updates(setting, executor, np.array([2]))
    assert key not in executor._requested.blocks


class OtherProcesses(Processes):
    """Of which the others have passes to make, `more` than this one."""

    def __init__(self, more: int) -> None:
        super().__init__(0, 2, torch.device("cpu"))
        self.more = more

    def any(self, flag: bool) -> bool:
        self.more -= not flag
        return flag or self.more >= 0


def test_passes_of_other_processes_are_made_along(
    setting: Setting, executor: SweepExecutor, expected: dict[int, Tensors], monkeypatch: pytest.MonkeyPatch
) -> None:
    dummies: list[tuple[int, ...]] = []
    monkeypatch.setattr(executor.model, "dummy_pass", lambda inputs: dummies.append(inputs["pixel_values"].shape))
    assert_same(setting, updates(setting, replace(executor, sharded_over=OtherProcesses(4))), expected)
    assert [shape[0] for shape in dummies] == [1] * 4
    assert updates(setting, replace(executor, sharded_over=OtherProcesses(2)), CLIENTS[:0]) == {}
    assert len(dummies) == 6


def failing(
    executor: SweepExecutor, lanes: int, monkeypatch: pytest.MonkeyPatch, message: str, first: int = 1
) -> list[int]:
    """From pass `first` on (from 0), more than `lanes` clients do not fit; the clients of every pass."""
    passes: list[int] = []
    features = executor.model.features

    def count(inputs: Any, plan: Any, *others: Any) -> Tensor:
        passes.append(len(plan.heads))
        if len(passes) > first and passes[-1] > lanes:
            raise RuntimeError(message)
        return features(inputs, plan, *others)

    monkeypatch.setattr(executor.model, "features", count)
    return passes


FULL = "DefaultCPUAllocator: can't allocate memory: x"


@pytest.mark.parametrize(
    ("lanes", "first", "left"),
    [(6, 0, 3), (4, 0, 2), (50, 0, 3), (6, 1, 2)],
    ids=["six", "four", "more than clients", "two clients are done"],
)
def test_half_as_many_lanes_go_on_when_memory_runs_out(
    lanes: int,
    first: int,
    left: int,
    setting: Setting,
    executor: SweepExecutor,
    expected: dict[int, Tensors],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    passes = failing(executor, 3, monkeypatch, FULL, first)
    smaller = replace(executor, lanes=lanes)
    assert_same(setting, updates(setting, smaller), expected)
    assert smaller.lanes == left
    assert max(passes[first + 1 :]) == left


def test_a_single_lane_must_fit(setting: Setting, executor: SweepExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(executor, 0, monkeypatch, FULL)
    with pytest.raises(InputError, match=r"^execution\.lanes: found too little memory for a single lane"):
        updates(setting, replace(executor, lanes=2))


@pytest.mark.parametrize(("message", "sharded_over"), [("shapes do not match", None), (FULL, OtherProcesses(0))])
def test_other_errors_and_those_of_a_shared_pass_end_the_round(
    message: str,
    sharded_over: Processes | None,
    setting: Setting,
    executor: SweepExecutor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failing(executor, 1, monkeypatch, message)
    with pytest.raises(RuntimeError, match=message):
        updates(setting, replace(executor, sharded_over=sharded_over))


def test_nobody_to_train_is_no_round(setting: Setting, executor: SweepExecutor) -> None:
    work, assignment = setting.work(0, CLIENTS[:0])
    assert isinstance(work, LocalWork)
    assert isinstance(assignment, Assignment)
    state: GlobalState = setting.state()
    assert list(executor.train(work, assignment, state)) == []
