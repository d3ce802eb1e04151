"""Clients get the updates of their own sub-models where bitsandbytes has quantized the blocks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fedra_engine.config import TrainingConfig
from fedra_engine.execution.sweep_model import SweepModel
from fedra_engine.models.quantization import has_quantized_weight
from tests.execution.test_exactness import assert_same_change, assert_same_rounds
from tests.quantized import quantized_foundation
from tests.tiny import DEPTH, make_samples
from tests.tiny_federation import ADAMW, SGD, Setting, make_setting

ONE_STEP = replace(SGD, lr=1e10, momentum=0.0, weight_decay=0.0, clip_norm=None, max_local_steps=1)


def quantized_setting(family: str, training: TrainingConfig, load_in: str, dtype: str, **options: Any) -> Setting:
    setting = make_setting(family, training, dropout=0.3, **options)
    setting.foundation = quantized_foundation(family, load_in, dtype, setting.lora)
    return setting


@pytest.mark.parametrize("family", ["vit", "bert", "gpt2"])
def test_sweep_equals_sequential_in_float64(family: str) -> None:
    training = replace(ADAMW, max_local_steps=2)
    assert_same_rounds(quantized_setting(family, training, "8bit", "float64"), lanes=3, count=2, tolerance=1e-8)


def test_so_it_does_with_checkpoints_and_targets_of_different_ranks() -> None:
    setting = quantized_setting("vit", SGD, "8bit", "float64", rank_pattern={"o_proj": 1})
    setting.checkpoint_blocks = True
    assert_same_rounds(setting, lanes=3, count=1, tolerance=1e-8)


@pytest.mark.parametrize("family", ["vit", "gpt2_lm", "llama_lm", "dinov3"])
def test_gradients_of_the_first_step_agree_in_four_bits(family: str) -> None:
    setting = quantized_setting(family, ONE_STEP, "4bit", "float32")
    (found,), (expected,) = setting.rounds(3), setting.rounds(None)
    for client, tensors in expected.updates.items():
        assert_same_change(found.updates[client], tensors, expected.before, tolerance=1e-4)


@pytest.mark.parametrize("load_in", ["8bit", "4bit"])
def test_a_sweep_shares_the_quantized_layers_and_fuses_no_block_of_them(load_in: str) -> None:
    """With all that they keep outside of their parameters."""
    foundation, samples = quantized_foundation("vit", load_in), make_samples("vit", 3)
    inputs = samples.inputs(torch.arange(3), torch.device("cpu"), torch.float32)
    model = SweepModel(foundation, lambda n: {name: tensor[:n] for name, tensor in inputs.items()}, fuse_blocks=True)
    assert model.fused == 0
    layers = [part for part in foundation.model.modules() if has_quantized_weight(part)]
    assert len(layers) == DEPTH * 6
    inside = list(model._model.modules())
    assert all(any(part is layer for part in inside) for layer in layers)
