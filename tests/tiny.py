"""Tiny foundation models and random data for tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers.models.dinov2 import modeling_dinov2

from fedra_engine.config import LoraConfig
from fedra_engine.data.cache import copy_async
from fedra_engine.data.samples import NOT_LEARNT, Batch, LearntTokens
from fedra_engine.models.foundation import Foundation, make_foundation
from fedra_engine.models.loading import PooledClassifier
from fedra_engine.runtime.randomness import SampleDraws
from tests.tiny_timm import timm_mixer, timm_vit

CLASSES = 5
DEPTH = 4
VOCABULARY = 30
PADDING = 0

_SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 2,
    "num_labels": CLASSES,
}
_IMAGE = _SIZES | {"image_size": 8, "patch_size": 4, "num_channels": 1}
_TEXT = _SIZES | {
    "intermediate_size": 32,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 16,
    "pad_token_id": PADDING,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_DECODER = _TEXT | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}
# Windows that are shorter than the texts.
_LOCAL = {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"] * (DEPTH // 2)}
_GPT2 = {
    "n_embd": 16,
    "n_layer": DEPTH,
    "n_head": 2,
    "n_inner": 32,
    "n_positions": 16,
    "vocab_size": VOCABULARY,
    "num_labels": CLASSES,
    "pad_token_id": PADDING,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _hf(name: str, settings: dict[str, Any], *, suffix: str) -> Callable[[], nn.Module]:
    """Makes transformers' `<name><suffix>` with random weights."""

    def make() -> nn.Module:
        model_class = getattr(transformers, name + suffix)
        return model_class(model_class.config_class(**settings))

    return make


def _image(name: str, **settings: Any) -> Callable[[], nn.Module]:
    return _hf(name, _IMAGE | settings, suffix="ForImageClassification")


def _text(name: str, settings: dict[str, Any]) -> Callable[[], nn.Module]:
    return _hf(name, settings, suffix="ForSequenceClassification")


def _causal(name: str, settings: dict[str, Any]) -> Callable[[], nn.Module]:
    return _hf(name, settings, suffix="")


def _pooled(name: str, **settings: Any) -> Callable[[], nn.Module]:
    make = _hf(name, _IMAGE | settings, suffix="Model")
    return lambda: PooledClassifier(make(), CLASSES, "pooler")


@dataclass(frozen=True)
class Family:
    """How to make a tiny model, what it reads, what it is for, and where its adapters go."""

    make: Callable[[], nn.Module]
    reads: str
    targets: list[str]
    causal_lm: bool = False


# Older versions of transformers, such as 5.17, have these names.
_DINOV2_TARGETS = ["query", "value"] if hasattr(modeling_dinov2, "Dinov2SelfAttention") else ["q_proj", "v_proj"]
_LLAMA_TARGETS = ["q_proj", "v_proj", "gate_proj", "down_proj"]
FAMILIES = {
    "vit": Family(_image("ViT", intermediate_size=32), "images", ["o_proj", "fc2"]),
    "deit": Family(_image("DeiT", intermediate_size=32), "images", ["q_proj", "fc1"]),
    "dinov2": Family(_image("Dinov2", mlp_ratio=2), "images", [*_DINOV2_TARGETS, "mlp.fc1"]),
    "dinov3": Family(
        _pooled("DINOv3ViT", intermediate_size=32, num_register_tokens=1), "images", ["o_proj", "up_proj", "down_proj"]
    ),
    "clip": Family(
        _hf(
            "CLIP",
            {"vision_config": _IMAGE | {"intermediate_size": 32}, "num_labels": CLASSES},
            suffix="ForImageClassification",
        ),
        "images",
        ["q_proj", "out_proj", "fc2"],
    ),
    "clip_vision": Family(_pooled("CLIPVision", intermediate_size=32), "images", ["q_proj", "out_proj", "fc2"]),
    "siglip": Family(
        _hf(
            "Siglip",
            {"vision_config": _IMAGE | {"intermediate_size": 32}, "num_labels": CLASSES},
            suffix="ForImageClassification",
        ),
        "images",
        ["k_proj", "fc1", "fc2"],
    ),
    "beit": Family(
        _image("Beit", intermediate_size=32, use_shared_relative_position_bias=True), "images", ["v_proj", "fc1"]
    ),
    "timm_vit": Family(lambda: timm_vit(CLASSES), "images", ["qkv", "proj", "fc2"]),
    "timm_mixer": Family(
        lambda: timm_mixer(CLASSES), "images", ["mlp_tokens.fc1", "mlp_tokens.fc2", "mlp_channels.fc2"]
    ),
    "bert": Family(_text("Bert", _TEXT), "texts", ["query", "attention.output.dense", "output.dense"]),
    "roberta": Family(_text("Roberta", _TEXT), "texts", ["key", "intermediate.dense"]),
    "distilbert": Family(
        _text("DistilBert", _TEXT | {"hidden_dim": 32, "dim": 16, "n_layers": DEPTH, "n_heads": 2}),
        "texts",
        ["q_lin", "out_lin", "ffn.lin1"],
    ),
    "modernbert": Family(
        _text(
            "ModernBert",
            _TEXT | {"cls_token_id": 1, "sep_token_id": 2, "global_attn_every_n_layers": 2, "local_attention": 4},
        ),
        "texts",
        ["Wqkv", "attn.Wo", "mlp.Wo"],
    ),
    "gpt2": Family(_text("GPT2", _GPT2), "texts", ["c_attn", "mlp.c_proj"]),
    "llama": Family(_text("Llama", _DECODER), "texts", _LLAMA_TARGETS),
    "qwen2": Family(_text("Qwen2", _DECODER | _LOCAL | {"use_sliding_window": True}), "texts", _LLAMA_TARGETS),
    "qwen3": Family(_text("Qwen3", _DECODER), "texts", _LLAMA_TARGETS),
    "gemma3": Family(_text("Gemma3Text", _DECODER | _LOCAL), "texts", ["k_proj", "up_proj"]),
    "gpt2_lm": Family(_causal("GPT2LMHeadModel", _GPT2), "texts", ["c_attn", "mlp.c_proj"], causal_lm=True),
    "llama_lm": Family(_causal("LlamaForCausalLM", _DECODER), "texts", _LLAMA_TARGETS, causal_lm=True),
    "qwen3_lm": Family(_causal("Qwen3ForCausalLM", _DECODER), "texts", _LLAMA_TARGETS, causal_lm=True),
}
TARGETS = {name: family.targets for name, family in FAMILIES.items()}
CLASSIFIERS = [name for name, family in FAMILIES.items() if not family.causal_lm]
CAUSAL_LMS = [name for name, family in FAMILIES.items() if family.causal_lm]


@dataclass(frozen=True)
class TensorSamples:
    """Samples held as the model's input tensors."""

    tensors: dict[str, Tensor]
    labels: Tensor
    domains: Tensor
    lengths: Tensor | None = None

    def digest(self) -> str:
        return repr({name: tensor.tolist() for name, tensor in self.tensors.items()})

    def inputs(self, rows: Tensor, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        selected = {name: copy_async(tensor[rows], device) for name, tensor in self.tensors.items()}
        return {name: t.to(dtype) if t.is_floating_point() else t for name, t in selected.items()}

    def batch(self, rows: Tensor, device: torch.device, dtype: torch.dtype, draws: SampleDraws | None = None) -> Batch:
        labels = self.labels[rows]
        return Batch(
            self.inputs(rows, device, dtype),
            copy_async(labels, device),
            learnt_tokens(labels) if labels.dim() == 2 else None,
        )


def learnt_tokens(labels: Tensor) -> LearntTokens:
    """The tokens of `labels` [samples, tokens] that are not marked as -100, without first ones."""
    samples, positions = np.nonzero(labels[:, 1:].numpy() != NOT_LEARNT)
    return LearntTokens(samples, positions + 1)


def make_model(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """With fresh random weights, the same in every call."""
    torch.manual_seed(0)
    model = FAMILIES[family].make().to(dtype)
    if dtype == torch.float64:
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.forward = MethodType(_double_rms_norm, module)
    return model


def _double_rms_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """transformers' RMSNorm rounds to float32 even in a float64 model, which would hide small errors of ours."""
    gain = norm.weight if hasattr(norm, "variance_epsilon") else 1 + norm.weight
    eps = getattr(norm, "variance_epsilon", None) or norm.eps
    return gain * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def make_samples(family: str, count: int) -> TensorSamples:
    """Random images, or texts of 3 to 10 tokens padded on the right, with random labels."""
    rng = np.random.default_rng(1)
    if FAMILIES[family].reads == "texts":
        lengths = rng.integers(3, 11, size=count)
        mask = torch.from_numpy((np.arange(10) < lengths[:, None]).astype(np.int64))
        tokens = torch.from_numpy(rng.integers(3, VOCABULARY, size=(count, 10)))
        tensors = {"input_ids": tokens.where(mask.bool(), PADDING), "attention_mask": mask}
    else:
        tensors = {"pixel_values": torch.from_numpy(rng.normal(size=(count, 1, 8, 8)))}
    if FAMILIES[family].causal_lm:
        # The first tokens of every text are its prompt.
        labels = tensors["input_ids"].where(mask.bool() & (torch.arange(10) > 1), -100)
    else:
        labels = torch.from_numpy(rng.integers(0, CLASSES, size=count))
    return TensorSamples(tensors, labels, torch.zeros(count, dtype=torch.int64))


def make_tiny(family: str, lora: LoraConfig, dtype: torch.dtype = torch.float64) -> Foundation:
    classes = None if FAMILIES[family].causal_lm else CLASSES
    return make_foundation(make_model(family, dtype), lora, classes=classes)
