"""Causal models are given no mask of the padding, all others are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fedra_engine.config import LoraConfig
from fedra_engine.execution.padding_mask import needs_padding_mask
from fedra_engine.execution.sweep_model import SweepModel
from fedra_engine.models.adapters import initial_adapters
from fedra_engine.models.batch_arguments import probe_batch_arguments
from fedra_engine.models.foundation import Foundation, make_foundation
from fedra_engine.models.loading import PooledClassifier
from tests.tiny import CLASSES, DEPTH, FAMILIES, PADDING, TARGETS, make_samples, make_tiny

CPU = torch.device("cpu")
TEXTS = [name for name, family in FAMILIES.items() if family.reads == "texts"]
CAUSAL = {"gpt2", "llama", "qwen2", "qwen3", "gemma3", "gpt2_lm", "llama_lm", "qwen3_lm"}


def is_needed(foundation: Foundation, family: str) -> bool:
    samples = make_samples(family, 6)

    def inputs(count: int) -> dict[str, Tensor]:
        return samples.inputs(torch.arange(count), CPU, foundation.dtype)

    arguments = probe_batch_arguments(foundation.model, foundation.blocks, inputs)
    return needs_padding_mask(foundation, arguments[0], inputs(2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", TEXTS)
def test_causal_models_need_no_mask(family: str, dtype: torch.dtype) -> None:
    foundation = make_tiny(family, LoraConfig(rank=3, target_modules=TARGETS[family]), dtype)
    assert is_needed(foundation, family) == (family not in CAUSAL)


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_mean_or_the_last_token_is_found_by_the_mask(family: str, pooling: Any) -> None:
    model = FAMILIES[family].make()
    backbone = getattr(model, model.base_model_prefix)
    lora = LoraConfig(rank=3, target_modules=TARGETS[family])
    assert is_needed(make_foundation(PooledClassifier(backbone, CLASSES, pooling), lora, classes=CLASSES), family)


@pytest.mark.parametrize("padding", [PADDING, PADDING + 1])
def test_the_mask_stays_where_the_model_takes_the_padding_for_text(padding: int) -> None:
    foundation = make_tiny("llama", LoraConfig(rank=3, target_modules=TARGETS["llama"]))
    foundation.model.config.pad_token_id = padding
    assert is_needed(foundation, "llama") == (padding != PADDING)


@pytest.mark.parametrize("family", ["llama", "qwen3_lm"])
def test_attention_over_padded_texts_is_causal_without_a_mask(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    foundation = make_tiny(family, LoraConfig(rank=3, target_modules=TARGETS[family]), torch.float32)
    samples = make_samples(family, 6)
    model = SweepModel(foundation, lambda n: samples.inputs(torch.arange(n), CPU, torch.float32))
    calls: list[dict[str, Any]] = []
    attention = F.scaled_dot_product_attention

    def watched(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(kwargs)
        return attention(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    inputs = samples.inputs(torch.arange(6), CPU, torch.float32)
    assert not inputs["attention_mask"].all()
    adapters = initial_adapters(foundation.adapter_layout, DEPTH, seed=0, dtype=torch.float32)
    with torch.no_grad():
        model.features_of(inputs, adapters, np.arange(DEPTH)[None])
    asked = {(call["attn_mask"], call["is_causal"], call["enable_gqa"]) for call in calls}
    assert asked == {(None, True, True)}
    assert len(calls) == DEPTH
