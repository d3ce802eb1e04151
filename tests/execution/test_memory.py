"""Lanes chosen by what they take, and halved when memory runs out; CPU threads that follow the size of a step."""

from __future__ import annotations

import logging
import subprocess
import sys
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedra_engine.execution import memory, sweep
from fedra_engine.execution.fused_block import AttentionCore, _Given
from fedra_engine.execution.lanes import LanePool
from fedra_engine.execution.memory import LaneMemory, choose_lanes, measure_lane
from fedra_engine.execution.model_check import ModelInputs
from fedra_engine.execution.plan import SweepPlan
from fedra_engine.execution.sweep import SweepExecutor
from fedra_engine.execution.sweep_model import SweepModel
from fedra_engine.experiment import build_experiment
from fedra_engine.runtime.errors import InputError
from tests.execution.test_exactness import assert_same_change
from tests.running import small_config
from tests.tiny_federation import ADAMW, Setting, make_setting

CPU = torch.device("cpu")
GIB = 2**30


@pytest.fixture
def eight_of_sixteen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "device_memory", lambda device: (8 * GIB, 16 * GIB))


def lane(gib: float, tokens: int = 1) -> LaneMemory:
    return LaneMemory(parameters=int(gib * GIB / 4), activations=int(gib * GIB * 3 / 4), tokens=tokens)


@pytest.mark.usefixtures("eight_of_sixteen")
@pytest.mark.parametrize(
    ("of_one", "chosen"),
    [
        (lane(1.0), 4),  # 5.6 GiB may be planned with
        (lane(1.5), 2),
        (lane(7.0), 1),  # More than may be planned with, but it is there.
        (lane(1e-6, tokens=100), 64),  # 81 would be enough for a CPU.
        (lane(1e-6, tokens=100_000), 1),
    ],
)
def test_auto_takes_what_is_worth_it_and_fits(of_one: LaneMemory, chosen: int) -> None:
    assert choose_lanes("auto", of_one, CPU, participants=1000) == chosen


@pytest.mark.usefixtures("eight_of_sixteen")
def test_lanes_that_cannot_fit_are_refused() -> None:
    with pytest.raises(InputError, match=r"^execution\.lanes: found auto, and 1 with a full batch take about 9\.0 GiB"):
        choose_lanes("auto", lane(9.0), CPU, participants=1000)
    with pytest.raises(InputError, match=r"^execution\.lanes: found 20, and 17 with a full batch take about 17\.0 GiB"):
        choose_lanes(20, lane(1.0), CPU, participants=17)
    # No more lanes are made than there are participants.
    assert choose_lanes(20, lane(1.0), CPU, participants=16) == 16


def test_a_gpu_with_room_gets_the_lanes_that_fill_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "device_memory", lambda device: (140 * GIB, 140 * GIB))
    # Sixteen images of a ViT-B/16 a client.
    of_one = LaneMemory(parameters=GIB // 2, activations=GIB, tokens=16 * 197)
    assert choose_lanes("auto", of_one, torch.device("cuda", 0), participants=1000) == 64


def test_what_torch_keeps_of_a_gpus_memory_and_does_not_use_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 500))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10)
    assert memory.device_memory(torch.device("cuda")) == (100 + 30 - 10, 500)


def test_of_the_lanes_asked_for_those_count_that_a_round_has_participants_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of thirty clients six take part."""
    asked = {"lanes": 30}
    one = build_experiment(small_config(tmp_path), CPU)
    of_one = measure_lane(one.foundation, one.sweep_model, one.train_samples, small_config(tmp_path).training, 1)
    monkeypatch.setattr(memory, "device_memory", lambda device: (0, 6 * of_one.total))
    assert build_experiment(small_config(tmp_path, execution=asked), CPU).executor.lanes == 6
    uniform = small_config(tmp_path, execution=asked, clients={"sampling": "uniform"})
    with pytest.raises(InputError, match=r"^execution\.lanes: found 30, and 30 with a full batch take"):
        build_experiment(uniform, CPU)


def test_threads_are_for_the_tokens_of_the_lanes_that_are_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tokens = list[int]()
    monkeypatch.setattr("fedra_engine.execution.executor.limit_threads", lambda _, of_a_step: tokens.append(of_a_step))
    for lanes in (1, 2):
        build_experiment(small_config(tmp_path, execution={"lanes": lanes}), CPU)
    # Six samples of five tokens.
    assert tokens == [30, 60]


def test_lanes_that_fit_one_process_only_are_refused_to_two_on_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=8 * GIB, total=16 * GIB))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert choose_lanes(12, lane(1.0), CPU, participants=1000) == 12
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"found 12, and 12 with a full batch .* expected at most the 8\.0 GiB"):
        choose_lanes(12, lane(1.0), CPU, participants=1000)


def test_a_lane_takes_as_much_as_measured() -> None:
    setting = make_setting("vit", ADAMW)
    executor, foundation = setting.executor(2), setting.foundation
    assert isinstance(executor, SweepExecutor)
    found = measure_lane(foundation, executor.model, executor.samples, ADAMW, heads=1)
    size = foundation.depth * foundation.adapter_layout.size + foundation.head_layout.size
    # Parameters, gradients and two moments in float64.
    assert found.parameters == size * 4 * 8
    hidden = foundation.model.config.hidden_size
    # At least what the norms and the products of every block keep of their inputs; at most a few times that.
    least = ADAMW.batch_size * (found.tokens // ADAMW.batch_size) * hidden * 8 * foundation.depth * 6
    assert least < found.activations < 6 * least
    larger = replace(ADAMW, batch_size=2 * ADAMW.batch_size)
    twice = measure_lane(foundation, executor.model, executor.samples, larger, heads=1)
    assert (twice.activations, twice.tokens) == (2 * found.activations, 2 * found.tokens)


@pytest.mark.parametrize(
    "message", ["CUDA out of memory. Tried to allocate 2 GiB", "DefaultCPUAllocator: can't allocate memory: x"]
)
def test_half_the_lanes_go_on_with_the_same_results(
    message: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    setting = make_setting("vit", ADAMW, dropout=0.3)
    (expected,) = setting.rounds(6)
    _fail_above(2, message, monkeypatch)
    with caplog.at_level(logging.WARNING):
        found_once = _updates_seen(setting, lanes=6)
    assert sorted(found_once) == list(range(len(setting.clients)))
    assert [record.getMessage() for record in caplog.records] == [
        "out of memory with 6 lanes; going on with 3",
        "out of memory with 3 lanes; going on with 1",
    ]
    (found,) = setting.rounds(6)
    assert found.updates.keys() == expected.updates.keys()
    for client, tensors in expected.updates.items():
        assert_same_change(found.updates[client], tensors, expected.before, 1e-8)


def test_two_lanes_become_one(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = make_setting("vit", ADAMW)
    _fail_above(1, "CUDA out of memory. Tried to allocate 2 GiB", monkeypatch)
    assert sorted(_updates_seen(setting, lanes=2)) == list(range(len(setting.clients)))


def _updates_seen(setting: Setting, lanes: int) -> list[int]:
    """Every client whose update the executor gave, as often as it gave one."""
    work, assignment = setting.work(0, np.arange(len(setting.clients)))
    return [
        client
        for updates in setting.executor(lanes).train(work, assignment, setting.state())
        for client in updates.clients.tolist()
    ]


def _fail_above(lanes: int, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second step of more than `lanes` clients fails, with the gradients of its backward already in the bank."""
    features, backward = SweepModel.features, SweepModel.backward
    passes: list[int] = []

    def count(self: SweepModel, inputs: ModelInputs, plan: SweepPlan, *others: Any) -> Tensor:
        passes.append(len(plan.heads))
        return features(self, inputs, plan, *others)

    def fail(self: SweepModel, loss: Tensor) -> None:
        backward(self, loss)
        if passes[-1] > lanes and passes.count(passes[-1]) > 1:
            raise torch.OutOfMemoryError(message)

    monkeypatch.setattr(SweepModel, "features", count)
    monkeypatch.setattr(SweepModel, "backward", fail)


def test_a_pass_that_breaks_off_before_its_backward_leaves_no_bank_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = make_setting("vit", ADAMW)
    executor, losses, clear = setting.executor(6), type(setting.foundation.task).losses, sweep.clear_device_cache
    banks: list[weakref.ref[Tensor]] = []
    freed: list[bool] = []

    class Pool(LanePool):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            banks.append(weakref.ref(self.adapters.compute_copy))

    def fail_once(*args: Any) -> Tensor:
        if not freed:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return losses(*args)

    def look(**options: Any) -> None:
        clear(**options)
        freed.append(banks[0]() is None)

    monkeypatch.setattr(sweep, "LanePool", Pool)
    monkeypatch.setattr(type(setting.foundation.task), "losses", fail_once)
    monkeypatch.setattr(sweep, "clear_device_cache", look)
    for _ in executor.train(*setting.work(0, np.arange(len(setting.clients))), setting.state()):
        pass
    assert freed == [True]


def test_a_fused_pass_that_breaks_off_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    # The attention takes the outputs of its first Linears one by one, and fails at the first of them.
    setting = make_setting("llama", ADAMW, fuse_blocks=True)
    (expected,) = setting.rounds(3)
    executor, state = setting.executor(6), setting.state()
    attend, take, clear = AttentionCore.__call__, _Given.forward, sweep.clear_device_cache
    awaited: list[weakref.ref[Tensor]] = []
    freed: list[bool] = []

    def watched(self: AttentionCore, projected: Sequence[Tensor], args: Any, kwargs: Any) -> Tensor:
        if not freed:
            awaited.extend(weakref.ref(part) for part in projected)
        return attend(self, projected, args, kwargs)

    def fail_in_the_first_pass(self: _Given, x: Tensor) -> Tensor:
        if not freed:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return take(self, x)

    def look(**options: Any) -> None:
        freed.extend(part() is None for part in awaited)
        clear(**options)

    monkeypatch.setattr(AttentionCore, "__call__", watched)
    monkeypatch.setattr(_Given, "forward", fail_in_the_first_pass)
    monkeypatch.setattr(sweep, "clear_device_cache", look)
    for updates in executor.train(*setting.work(0, np.arange(len(setting.clients))), state):
        for index, client in enumerate(updates.clients.tolist()):
            found = setting.named(updates.of_client(index), state)
            assert_same_change(found, expected.updates[client], expected.before, 1e-8)
    assert freed == [True, True, True]


def test_a_single_lane_that_does_not_fit_is_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    _fail_above(0, "CUDA out of memory. Tried to allocate 2 GiB", monkeypatch)
    with pytest.raises(InputError, match=r"^execution\.lanes: found too little memory for a single lane"):
        make_setting("vit", ADAMW).rounds(2)


def test_other_errors_are_not_taken_for_full_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: SweepModel, loss: Tensor) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(SweepModel, "backward", fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        make_setting("vit", ADAMW).rounds(2)


FREED = """
import resource, sys
import torch
from fedra_engine.execution.memory import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()

def step():
    for tensor in [torch.empty(5 << 20) for _ in range(8)]:
        tensor.fill_(1)

step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_freed_memory_is_kept_for_the_next_step_by_glibc() -> None:
    faults = {}
    for what in ("keep", "give back"):
        done = subprocess.run([sys.executable, "-c", FREED, what], capture_output=True, text=True, check=True)
        faults[what] = int(done.stdout)
    # 160 MiB are 40,960 pages of 4 KiB; larger pages make fewer.
    assert faults["keep"] < faults["give back"] / 2
