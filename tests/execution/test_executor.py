"""The executor and the sweep model that a configuration asks for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fedra_engine.config import ExecutionConfig, ExperimentConfig, LoraConfig
from fedra_engine.execution import executor
from fedra_engine.execution.executor import make_executor, make_sweep_model
from fedra_engine.execution.memory import LaneMemory
from fedra_engine.execution.sequential import SequentialExecutor
from fedra_engine.execution.sweep import SweepExecutor
from fedra_engine.runtime.errors import InputError
from tests.tiny import DEPTH, TARGETS, make_samples, make_tiny
from tests.tiny_federation import SAMPLE_COUNTS, SGD, make_setting


@pytest.mark.parametrize(
    ("family", "asked", "fused"),
    [
        ("vit", "on", DEPTH),
        ("vit", "off", 0),
        ("vit", "auto", DEPTH),
        ("llama", "on", DEPTH),
        ("llama", "auto", 0),
    ],
)
def test_blocks_are_fused_where_asked_and_by_default_on_a_cpu_those_with_plain_attention(
    family: str, asked: str, fused: int
) -> None:
    foundation = make_tiny(family, LoraConfig(rank=3, target_modules=TARGETS[family]))
    model = make_sweep_model(ExecutionConfig(fused_blocks=asked), foundation, make_samples(family, 4), None)
    assert model.fused == fused


def test_fused_blocks_are_refused_where_no_block_is_known() -> None:
    foundation = make_tiny("bert", LoraConfig(rank=3, target_modules=TARGETS["bert"]))
    with pytest.raises(InputError, match=r"execution\.fused_blocks: found on with a bert model, none of whose blocks"):
        make_sweep_model(ExecutionConfig(fused_blocks="on"), foundation, make_samples("bert", 4), None)


@pytest.mark.parametrize(
    ("asked", "kind", "lanes"), [("sequential", SequentialExecutor, 1), ("sweep", SweepExecutor, 3)]
)
def test_an_executor_has_the_lanes_that_it_is_asked_for(asked: str, kind: type, lanes: int) -> None:
    lora, samples = LoraConfig(rank=3, target_modules=TARGETS["vit"]), make_samples("vit", 4)
    foundation = make_tiny("vit", lora)
    config = ExperimentConfig(lora=lora, execution=ExecutionConfig(executor=asked, lanes=3))
    model = make_sweep_model(config.execution, foundation, samples, None)
    made = make_executor(config, foundation, model, samples, 6, 1, None)
    assert type(made) is kind
    assert made.lanes == lanes


def test_with_graphs_a_lane_has_the_memory_of_a_step_twice_and_only_training_needs_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    setting = make_setting("vit", SGD)
    samples, asked = make_samples("vit", sum(SAMPLE_COUNTS)), dict[str, LaneMemory]()
    for graphs in ("off", "on"):

        def choose(lanes: object, memory: LaneMemory, *others: object, graphs: str = graphs) -> int:
            asked[graphs] = memory
            return 2

        monkeypatch.setattr(executor, "choose_lanes", choose)
        config = ExperimentConfig(lora=setting.lora, execution=ExecutionConfig(cuda_graphs=graphs))
        model = make_sweep_model(config.execution, setting.foundation, samples, None)
        made = make_executor(config, setting.foundation, model, samples, 6, 1, None)
    assert asked["on"] == replace(asked["off"], activations=2 * asked["off"].activations)
    with pytest.raises(InputError, match=r"^execution\.cuda_graphs: found on with the device cpu, expected off$"):
        next(iter(made.train(*setting.work(0, np.arange(6)), setting.state())))
