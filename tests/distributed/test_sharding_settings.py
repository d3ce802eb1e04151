"""What of a DeepSpeed configuration contradicts an experiment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedra_engine.config import ExecutionConfig, ExperimentConfig, LoraConfig, ModelConfig
from fedra_engine.experiment import build_experiment
from fedra_engine.models.sharding import Sharding, refuse_sharding
from fedra_engine.runtime.errors import InputError
from fedra_engine.runtime.processes import join_job
from tests.tiny import make_tiny

SHIPPED = sorted((Path(__file__).parents[2] / "configs" / "deepspeed").glob("*.json"))
STAGE_3 = {"stage": 3}


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_the_shipped_configurations_fit_the_default_experiment(file: Path) -> None:
    Sharding(json.loads(file.read_text())).check(ExperimentConfig())


@pytest.mark.parametrize(
    "settings",
    [
        {"bf16": {"enabled": False}, "fp16": {"enabled": "auto"}},
        {"train_batch_size": "auto", "gradient_accumulation_steps": 1, "gradient_clipping": "auto"},
        {
            "zero_optimization": {
                "stage": 3,
                "offload_optimizer": {"device": "none"},
                "offload_param": {"device": "cpu"},
            }
        },
    ],
)
def test_what_accelerate_fills_in_does_not_contradict(settings: dict[str, Any]) -> None:
    Sharding({"zero_optimization": STAGE_3, **settings}).check(ExperimentConfig())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"zero_optimization": {"stage": 2}}, "deepspeed.zero_optimization.stage: found 2, expected 3"),
        ({"zero_optimization": {}}, "deepspeed.zero_optimization.stage: found None, expected 3"),
        ({"optimizer": {"type": "AdamW"}}, "deepspeed.optimizer: found one, expected none"),
        ({"scheduler": {"type": "WarmupLR"}}, "deepspeed.scheduler: found one, expected none"),
        ({"train_batch_size": 32}, "deepspeed.train_batch_size: found 32, expected none"),
        ({"gradient_clipping": 1.0}, "deepspeed.gradient_clipping: found 1.0, expected none"),
        ({"gradient_accumulation_steps": 4}, "deepspeed.gradient_accumulation_steps: found 4, expected none"),
        ({"bf16": {"enabled": True}}, "deepspeed.bf16.enabled: found True with model.dtype float32, expected False"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            "deepspeed.zero_optimization.offload_param.device: found nvme, expected none",
        ),
    ],
)
def test_a_configuration_that_contradicts_the_experiment_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as found:
        Sharding({"zero_optimization": STAGE_3, **settings}).check(ExperimentConfig())
    assert str(found.value).startswith(message)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"execution": ExecutionConfig(executor="sequential")}, "execution.executor: found sequential with a sharded"),
        ({"model": ModelConfig(load_in="8bit")}, "model.load_in: found 8bit with a sharded model, expected null"),
        ({"lora": LoraConfig(modules_to_save=["norm"])}, r"lora\.modules_to_save: found \['norm'\] with a shard"),
        ({"execution": ExecutionConfig(fused_blocks="on")}, "execution.fused_blocks: found on with a sharded model"),
        ({"execution": ExecutionConfig(cuda_graphs="on")}, "execution.cuda_graphs: found on with a sharded model"),
        (
            {"model": ModelConfig(dtype="bfloat16"), "settings": {"bf16": {"enabled": False}}},
            "deepspeed.bf16.enabled: found False with model.dtype bfloat16",
        ),
    ],
)
def test_an_experiment_that_cannot_be_sharded_is_refused(changes: dict[str, Any], message: str) -> None:
    settings = {"zero_optimization": STAGE_3, **changes.pop("settings", {})}
    with pytest.raises(InputError, match=message):
        Sharding(settings).check(replace(ExperimentConfig(), **changes))


def test_an_experiment_is_not_begun_with_settings_that_contradict_it() -> None:
    with pytest.raises(InputError, match="found 1, expected 3"):
        build_experiment(
            ExperimentConfig(), torch.device("cpu"), sharding=Sharding({"zero_optimization": {"stage": 1}})
        )


def test_weights_in_shards_are_not_rewritten() -> None:
    foundation = make_tiny("vit", LoraConfig(target_modules=["fc1"]))
    next(foundation.model.parameters()).ds_id = 0  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=r"method\.name: found one that rewrites the weights of the model"):
        foundation.base()


def test_what_needs_the_whole_model_refuses_a_job_with_deepspeed() -> None:
    plugin = SimpleNamespace(deepspeed_config={"zero_optimization": STAGE_3})
    state = SimpleNamespace(deepspeed_plugin=plugin)
    accelerator: Any = SimpleNamespace(state=state, device=torch.device("cuda"))
    with pytest.raises(InputError, match="dry_run: found true in a job with DeepSpeed"):
        refuse_sharding(accelerator)
    state.deepspeed_plugin = None
    refuse_sharding(accelerator)


def test_a_deepspeed_configuration_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", "nowhere.json")
    with pytest.raises(InputError, match=r"accelerate: found a job that it cannot set up .*nowhere\.json") as found:
        join_job()
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("content", [[1], "stage 3", {"zero_optimization": [3]}], ids=json.dumps)
def test_a_deepspeed_configuration_without_fields_is_refused(
    content: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("deepspeed")
    (tmp_path / "zero3.json").write_text(json.dumps(content))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "zero3.json"))
    with pytest.raises(
        InputError, match=r"accelerate: found no fields in .*zero3\.json.* expected a DeepSpeed"
    ) as found:
        join_job()
    assert "\n" not in str(found.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"zero_optimization": {**STAGE_3, "stage_3_prefetch_bucket_size": 1}}, "stage_3_prefetch_bucket_size"),
        ({"zero_optimization": STAGE_3, "comms_logger": 4}, "CommsLoggerConfig"),
    ],
)
def test_settings_that_deepspeed_does_not_know_are_not_taken_for_a_bad_model(
    settings: dict[str, Any], said: str, tmp_path: Path
) -> None:
    """In a process of its own, for DeepSpeed makes it one of a job."""
    pytest.importorskip("deepspeed")
    code = (
        "import sys, json\n"
        "from fedra_engine.config import ModelConfig\n"
        "from fedra_engine.runtime.errors import InputError\n"
        "from fedra_engine.models.sharding import Sharding\n"
        "from fedra_engine.models.loading import load_pretrained\n"
        "try:\n"
        "    load_pretrained(ModelConfig(), classes=10, sharding=Sharding(json.loads(sys.argv[1])))\n"
        "except InputError as error:\n"
        "    print(error)\n"
    )
    job = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(settings)],
        env={**os.environ, **job, "DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    line = done.stdout.splitlines()[-1]
    assert line.startswith("deepspeed: found settings that it cannot use (")
    assert said in line


@pytest.mark.slow
def test_deepspeed_is_imported_by_those_who_shard_only() -> None:
    code = "import fedra_engine.simulation, sys; sys.exit('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
