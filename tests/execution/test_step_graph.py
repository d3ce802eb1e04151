"""Local steps that are captured once and replayed give the same bits; what a capture must not hold stays outside."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedra_engine.data.samples import Batch
from fedra_engine.execution import banks
from fedra_engine.execution.step_graph import FEWEST_STEPS, CudaGraphCapture, GraphCapture, RepeatedStep
from fedra_engine.execution.sweep import SweepExecutor
from fedra_engine.federation.aggregation import Aggregator
from fedra_engine.runtime.errors import InputError
from tests.execution.recorded_graph import RecordedCapture, as_one_op
from tests.execution.test_assignments import EXITS, early_exits, penalised_ranks
from tests.tiny_federation import ADAMW, SGD, Setting, make_setting

# Clients with 14, 6, 24, 2, 14 and 18 steps, whose batches have all one size.
ONE_SAMPLE: dict[str, Any] = {"batch_size": 1, "max_local_steps": None, "local_epochs": 2}


@pytest.fixture(autouse=True)
def one_launch_each(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sgd", "adamw", "squared_norms"):
        monkeypatch.setattr(banks, name, as_one_op(getattr(banks, name)))


def trained(setting: Setting, capture: GraphCapture | None) -> list[Tensor]:
    """What two rounds in three lanes give, tensor by tensor."""
    executor, state, found = setting.executor(3), setting.state(), list[Tensor]()
    assert isinstance(executor, SweepExecutor)
    executor.capture = capture and (lambda: capture)
    for index in range(2):
        aggregator = Aggregator(state)
        for updates in executor.train(*setting.work(index, np.arange(6)), state):
            aggregator.add(updates)
            # Copies, as a view would change with the bank.
            found += [updates.losses.clone(), updates.adapters[updates.slots], updates.heads[updates.head_rows]]
        state = aggregator.result()
        found += [state.adapters, state.heads]
    return found


def poison(inputs: list[Tensor]) -> None:
    for tensor in inputs:
        tensor.fill_(torch.nan if tensor.is_floating_point() else 0)


SETTINGS: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "SGD": (SGD, {}, {}),
    "AdamW, dropout": (ADAMW, {"dropout": 0.3}, {}),
    "whole blocks, dropout": (SGD, {"dropout": 0.3, "fuse_blocks": True}, {}),
    "checkpointed blocks, dropout": (SGD, {"dropout": 0.3}, {"checkpoint_blocks": True}),
    "exits": (ADAMW, {}, {"assignment": early_exits, "exits": len(EXITS)}),
    "exits, dropout, trained norm": (
        ADAMW,
        {"dropout": 0.3, "modules_to_save": ["layernorm"]},
        {"assignment": early_exits, "exits": len(EXITS)},
    ),
    "local terms": (replace(SGD, proximal_mu=0.1), {}, {"assignment": penalised_ranks}),
    "stand-ins": (SGD, {}, {"stand_ins": True}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_replayed_steps_give_the_same_bits(name: str) -> None:
    training, options, fields = SETTINGS[name]
    setting = make_setting("vit", replace(training, **ONE_SAMPLE), **options)
    for field, value in fields.items():
        setattr(setting, field, value)
    # What a replay reads of its inputs has been copied there since the last one.
    capture = RecordedCapture(poison)
    for found, expected in zip(trained(setting, capture), trained(setting, None), strict=True):
        assert torch.equal(found, expected)
    assert len(capture.replays) >= 4
    assert min(capture.replays) >= FEWEST_STEPS


def test_a_step_runs_as_it_is_once_and_is_captured_if_enough_are_left() -> None:
    trained: list[list[float]] = []
    seen = torch.zeros(2)

    def train(batch: Batch) -> None:
        # Python runs in the first step and in the capture; the sum also in each replay.
        trained.append(batch.labels.tolist())
        seen.add_(batch.inputs["x"])

    def batch(number: int) -> Batch:
        return Batch({"x": torch.tensor([1.0, 10.0]) * number}, torch.tensor([number]))

    for steps, runs in [(FEWEST_STEPS, FEWEST_STEPS), (FEWEST_STEPS + 1, 2), (9, 2)]:
        trained.clear()
        seen.zero_()
        capture = RecordedCapture()
        step = RepeatedStep(train, steps, capture)
        for number in range(steps):
            step.run(batch(number))
        assert len(trained) == runs
        assert capture.replays == ([steps - 1] if runs == 2 else [])
        assert seen.tolist() == [sum(range(steps)), 10 * sum(range(steps))]


class Failing(RecordedCapture):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def capture(self, step: Any) -> Callable[[], None]:
        raise self.error


def test_a_step_that_cannot_be_captured_ends_the_run_with_one_line() -> None:
    setting = make_setting("vit", replace(SGD, **ONE_SAMPLE))
    reason = RuntimeError("CUDA error: operation not permitted when stream is capturing\n\nmuch advice")
    with pytest.raises(InputError) as caught:
        trained(setting, Failing(reason))
    assert str(caught.value) == (
        "execution.cuda_graphs: found a local step that cannot be captured (CUDA error: operation not permitted when "
        "stream is capturing), expected off"
    )


def test_fewer_lanes_go_on_when_memory_runs_out_in_a_capture() -> None:
    setting = make_setting("vit", replace(SGD, **ONE_SAMPLE))
    executor = setting.executor(3)
    assert isinstance(executor, SweepExecutor)
    captures = [Failing(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")), RecordedCapture()]
    left = iter(captures)
    executor.capture = lambda: next(left)
    clients = [
        client
        for updates in executor.train(*setting.work(0, np.arange(6)), setting.state())
        for client in updates.clients
    ]
    assert sorted(clients) == [0, 1, 2, 3, 4, 5]
    assert executor.lanes == 1
    assert captures[1].replays


class FakeCuda:
    """What `CudaGraphCapture` asks of torch.cuda, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        cuda, graphs = self, iter("ABC")
        self.current = FakeStream(self, "outer")

        class Graph:
            def __init__(self) -> None:
                self.name = next(graphs)

            def pool(self) -> str:
                return f"pool of {self.name}"

            def capture_begin(self, pool: str | None) -> None:
                cuda.events.append(f"begin {self.name} in {pool} on {cuda.current.name}")

            def capture_end(self) -> None:
                cuda.events.append(f"end {self.name}")
                if cuda.events[-2] == "fails":
                    raise RuntimeError("capture was invalidated")

            def replay(self) -> None:
                cuda.events.append(f"replay {self.name}")

        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: FakeStream(self, "own"))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self.on)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: self.events.append("synchronize"))
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: self.events.append("empty_cache"))

    @contextmanager
    def on(self, stream: FakeStream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before


@dataclass
class FakeStream:
    cuda: FakeCuda
    name: str
    device: str = "cuda"

    def wait_stream(self, other: FakeStream) -> None:
        self.cuda.events.append(f"{self.name} waits for {other.name}")


def test_graphs_are_captured_on_one_stream_in_one_pool_and_a_failure_keeps_its_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = FakeCuda(monkeypatch)
    capture = CudaGraphCapture(torch.device("cuda"))

    def fail() -> None:
        cuda.events.append("fails")
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with capture.stream():
        replay = capture.capture(lambda: cuda.events.append("step 1"))
        replay()
        replay()
    first = ["own waits for outer", "synchronize", "empty_cache", "begin A in None on own", "step 1", "end A"]
    assert cuda.events == [*first, "replay A", "replay A", "outer waits for own"]
    cuda.events.clear()
    with capture.stream():
        capture.capture(lambda: cuda.events.append("step 2"))()
    second = ["own waits for outer", "begin B in pool of A on own", "step 2", "end B", "replay B"]
    assert cuda.events == [*second, "outer waits for own"]
    cuda.events.clear()
    with pytest.raises(torch.OutOfMemoryError), capture.stream():
        capture.capture(fail)
    assert cuda.events[1:] == ["begin C in pool of B on own", "fails", "end C", "outer waits for own"]
