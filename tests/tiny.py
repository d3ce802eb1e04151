"""Tiny foundation models and random data for tests."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from fedra_engine.config import LoraConfig
from fedra_engine.models.foundation import Foundation, make_foundation

CLASSES = 5
DEPTH = 4

_SIZES = {"hidden_size": 16, "num_hidden_layers": DEPTH, "num_attention_heads": 2}
TARGETS = {
    "vit": ["o_proj", "fc2"],
    "dinov2": ["q_proj", "v_proj", "mlp.fc1"],
    "bert": ["query", "attention.output.dense", "output.dense"],
}


@dataclass(frozen=True)
class TensorSamples:
    """Samples held as the model's input tensors."""

    tensors: dict[str, Tensor]
    labels: Tensor
    domains: Tensor

    def inputs(self, rows: Tensor, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        selected = {name: tensor[rows].to(device) for name, tensor in self.tensors.items()}
        return {name: t.to(dtype) if t.is_floating_point() else t for name, t in selected.items()}


def make_model(family: str) -> nn.Module:
    torch.manual_seed(0)
    if family == "vit":
        return ViTForImageClassification(
            ViTConfig(**_SIZES, intermediate_size=32, image_size=8, patch_size=4, num_channels=1, num_labels=CLASSES)
        )
    if family == "dinov2":
        return Dinov2ForImageClassification(
            Dinov2Config(**_SIZES, mlp_ratio=2, image_size=8, patch_size=4, num_channels=1, num_labels=CLASSES)
        )
    return BertForSequenceClassification(
        BertConfig(**_SIZES, intermediate_size=32, vocab_size=30, max_position_embeddings=12, num_labels=CLASSES)
    )


def make_samples(family: str, count: int) -> TensorSamples:
    rng = np.random.default_rng(1)
    if family == "bert":
        lengths = rng.integers(3, 11, size=count)
        tensors = {
            "input_ids": torch.from_numpy(rng.integers(1, 30, size=(count, 10))),
            "attention_mask": torch.from_numpy((np.arange(10) < lengths[:, None]).astype(np.int64)),
        }
    else:
        tensors = {"pixel_values": torch.from_numpy(rng.normal(size=(count, 1, 8, 8)))}
    labels = torch.from_numpy(rng.integers(0, CLASSES, size=count))
    return TensorSamples(tensors, labels, torch.zeros(count, dtype=torch.int64))


def make_tiny(family: str, lora: LoraConfig, dtype: torch.dtype = torch.float64) -> Foundation:
    return make_foundation(make_model(family).to(dtype), lora, classes=CLASSES)
