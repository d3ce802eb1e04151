"""Causal models are given no mask of the padding, all others are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BertForSequenceClassification,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForSequenceClassification,
)

from fedra_engine.config import LoraConfig
from fedra_engine.execution.padding_mask import MaskUse, find_mask_use
from fedra_engine.execution.sweep_model import SweepModel
from fedra_engine.models.adapters import initial_adapters
from fedra_engine.models.batch_arguments import probe_batch_arguments
from fedra_engine.models.foundation import Foundation, make_foundation
from fedra_engine.models.loading import PooledClassifier
from tests.tiny import CLASSES, DEPTH, FAMILIES, PADDING, TARGETS, make_model, make_samples, make_tiny

CPU = torch.device("cpu")
TEXTS = [name for name, family in FAMILIES.items() if family.reads == "texts"]
CAUSAL = {"gpt2", "llama", "qwen2", "qwen3", "gemma3", "gpt2_lm", "llama_lm", "qwen3_lm"}


def mask_use(foundation: Foundation, family: str) -> MaskUse:
    samples = make_samples(family, 6)

    def inputs(count: int) -> dict[str, Tensor]:
        return samples.inputs(torch.arange(count), CPU, foundation.dtype)

    arguments = probe_batch_arguments(foundation.model, foundation.blocks, inputs)
    return find_mask_use(foundation, arguments[0], inputs(2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", TEXTS)
def test_causal_models_need_no_mask(family: str, dtype: torch.dtype) -> None:
    foundation = make_tiny(family, LoraConfig(rank=3, target_modules=TARGETS[family]), dtype)
    assert mask_use(foundation, family) == ("never" if family in CAUSAL else "padded")


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_mean_or_the_last_token_is_found_by_the_mask(family: str, pooling: Any) -> None:
    model = FAMILIES[family].make()
    backbone = getattr(model, model.base_model_prefix)
    lora = LoraConfig(rank=3, target_modules=TARGETS[family])
    foundation = make_foundation(PooledClassifier(backbone, CLASSES, pooling), lora, classes=CLASSES)
    assert mask_use(foundation, family) == "padded"


def local_encoder() -> nn.Module:
    """Tokens read neighbours on both sides, and the first one classifies."""
    return ModernBertForSequenceClassification(
        ModernBertConfig(
            hidden_size=16, num_hidden_layers=DEPTH, num_attention_heads=4, intermediate_size=32, vocab_size=32,
            max_position_embeddings=64, num_labels=CLASSES, pad_token_id=PADDING, local_attention=4,
            layer_types=["sliding_attention"] * DEPTH, initializer_range=1.0,
        )
    )  # fmt: skip


def test_the_mask_stays_where_padding_reaches_only_short_texts() -> None:
    """Of the samples that are tried, both are longer than what the first token can read."""
    foundation = make_foundation(local_encoder(), LoraConfig(rank=3, target_modules=["Wqkv"]), classes=CLASSES)
    ids = torch.randint(3, 30, (6, 20), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([20, 18, 3, 4, 5, 3])
    mask = (torch.arange(20) < lengths[:, None]).long()
    inputs = {"input_ids": ids.where(mask.bool(), PADDING), "attention_mask": mask}
    model = SweepModel(foundation, lambda n: {name: tensor[:n] for name, tensor in inputs.items()})
    no_adapters = torch.zeros(DEPTH, foundation.adapter_layout.size)
    with torch.no_grad():
        found = foundation.head(model.features_of(inputs, no_adapters, np.arange(DEPTH)[None]))
        torch.testing.assert_close(found, foundation.model(**inputs).logits)


class RequiresMask(BertForSequenceClassification):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return super().forward(input_ids=input_ids, attention_mask=attention_mask)


class FindsPaddingByItself(BertForSequenceClassification):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        mask = (input_ids != PADDING).long() if attention_mask is None else attention_mask
        return super().forward(input_ids=input_ids, attention_mask=mask)


class WantsThreeTokens(LlamaForCausalLM):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        if ((input_ids != PADDING).sum(1) < 3).any():
            raise ValueError("found fewer than three tokens")
        return super().forward(input_ids=input_ids, attention_mask=attention_mask)


@pytest.mark.parametrize("kind", [RequiresMask, FindsPaddingByItself])
def test_a_mask_of_ones_is_given_where_none_is_something_else(kind: type[nn.Module]) -> None:
    model = make_model("bert")
    model.__class__ = kind
    foundation = make_foundation(model, LoraConfig(rank=3, target_modules=TARGETS["bert"]), classes=CLASSES)
    samples = make_samples("bert", 6)
    sweep = SweepModel(foundation, lambda n: samples.inputs(torch.arange(n), CPU, foundation.dtype))
    ids = torch.randint(3, 30, (2, 10), generator=torch.Generator().manual_seed(0))
    # As the token between two documents of a text.
    ids[0, 3] = PADDING
    adapters = initial_adapters(foundation.adapter_layout, DEPTH, seed=0, dtype=foundation.dtype)
    with torch.no_grad():
        found = sweep.features_of({"input_ids": ids}, adapters, np.arange(DEPTH)[None])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        assert torch.equal(found, sweep.features_of(inputs, adapters, np.arange(DEPTH)[None]))


def test_a_model_that_refuses_what_is_tried_keeps_its_mask() -> None:
    model = make_model("llama_lm")
    model.__class__ = WantsThreeTokens
    foundation = make_foundation(model, LoraConfig(rank=3, target_modules=TARGETS["llama_lm"]), classes=None)
    assert mask_use(foundation, "llama_lm") == "padded"


@pytest.mark.parametrize("padding", [PADDING, PADDING + 1])
def test_the_mask_stays_where_the_model_takes_the_padding_for_text(padding: int) -> None:
    foundation = make_tiny("llama", LoraConfig(rank=3, target_modules=TARGETS["llama"]))
    foundation.model.config.pad_token_id = padding
    assert mask_use(foundation, "llama") == ("never" if padding == PADDING else "padded")


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
