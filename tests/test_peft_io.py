"""What is saved is what PEFT loads onto the pretrained model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from torch import Tensor
from torch.nn.functional import linear
from transformers import AutoModel, AutoModelForCausalLM

from fedra_engine.config import ExperimentConfig, LoraConfig, ModelConfig
from fedra_engine.execution.plan import single_client_plan
from fedra_engine.execution.sweep_model import SweepModel
from fedra_engine.models.foundation import Foundation, make_foundation
from fedra_engine.models.loading import load_pretrained
from fedra_engine.models.pooling import PooledClassifier
from fedra_engine.models.state import GlobalState
from fedra_engine.peft_io import save_adapter
from tests.tiny import CLASSES, DEPTH, TARGETS, make_model, make_samples

CPU = torch.device("cpu")


def trained(folder: Path, family: str) -> tuple[ExperimentConfig, Foundation, GlobalState]:
    """A model directory at `folder`, and a state of it that has come a long way."""
    model = make_model(family)
    (model.backbone if isinstance(model, PooledClassifier) else model).save_pretrained(folder)
    lora = LoraConfig(rank=3, alpha=6, target_modules=TARGETS[family])
    config = ExperimentConfig(model=ModelConfig(path=str(folder)), lora=lora)
    classes = None if family.endswith("_lm") else CLASSES
    foundation = make_foundation(load_pretrained(config.model, classes=classes), lora, classes=classes)
    torch.manual_seed(1)
    adapters = 0.3 * torch.randn(DEPTH, foundation.adapter_layout.size)
    heads = torch.randn(1, foundation.head_layout.size)
    heads[:, foundation.head_layout.trained.stop :] = 0
    return config, foundation, GlobalState(adapters, heads)


@torch.no_grad()
def features(foundation: Foundation, state: GlobalState, family: str) -> tuple[Tensor, dict[str, Tensor]]:
    """What the sweep hands to the head, and the inputs it got."""
    inputs = make_samples(family, 4).inputs(torch.arange(4), CPU, torch.float32)
    model = SweepModel(foundation, lambda n: {name: tensor[:n] for name, tensor in inputs.items()})
    model.bind(state.adapters, torch.empty_like(state.adapters))
    plan = single_client_plan(4, np.arange(DEPTH), scale=2.0, dtype=torch.float32, device=CPU)
    return model.features(inputs, plan), inputs


@torch.no_grad()
def reloaded(auto_class: Any, folder: Path, inputs: dict[str, Tensor], **settings: Any) -> Any:
    base = auto_class.from_pretrained(folder, **settings)
    return PeftModel.from_pretrained(base, str(folder / "adapters")).eval()(**inputs)


@pytest.mark.parametrize("family", ["vit", "roberta", "distilbert", "gpt2", "llama"])
def test_a_classifier_comes_back_with_its_head(tmp_path: Path, family: str) -> None:
    config, foundation, state = trained(tmp_path, family)
    save_adapter(tmp_path / "adapters", foundation, config, state)
    found, inputs = features(foundation, state, family)
    layout = foundation.head_layout
    expected = linear(found, layout.weight(state.heads[0]), layout.bias(state.heads[0]))
    output = reloaded(type(foundation.model), tmp_path, inputs, num_labels=CLASSES)
    torch.testing.assert_close(output.logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["dinov3", "clip_vision"])
def test_a_pooled_backbone_comes_back_and_its_head_stands_beside_it(tmp_path: Path, family: str) -> None:
    config, foundation, state = trained(tmp_path, family)
    save_adapter(tmp_path / "adapters", foundation, config, state)
    expected, inputs = features(foundation, state, family)
    output = reloaded(AutoModel, tmp_path, inputs)
    torch.testing.assert_close(output.pooler_output, expected, rtol=1e-4, atol=1e-5)
    with safe_open(tmp_path / "adapters" / "head.safetensors", "pt") as file:
        assert file.metadata() == {"pooling": "pooler"}
        assert torch.equal(file.get_tensor("weight"), foundation.head_layout.weight(state.heads[0]))
        assert torch.equal(file.get_tensor("bias"), foundation.head_layout.bias(state.heads[0]))


@pytest.mark.parametrize("family", ["gpt2_lm", "llama_lm"])
def test_a_language_model_comes_back_with_its_own_output_layer(tmp_path: Path, family: str) -> None:
    config, foundation, state = trained(tmp_path, family)
    save_adapter(tmp_path / "adapters", foundation, config, state)
    found, inputs = features(foundation, state, family)
    output = reloaded(AutoModelForCausalLM, tmp_path, inputs)
    torch.testing.assert_close(output.logits, foundation.head(found), rtol=1e-4, atol=1e-5)
