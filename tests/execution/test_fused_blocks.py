"""Fused blocks give what the same sweep gives without them."""

from __future__ import annotations

from types import MethodType

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForSequenceClassification,
    Qwen2Config,
    Qwen2ForSequenceClassification,
    Qwen3Config,
    Qwen3ForSequenceClassification,
)

from fedra_engine.config import LoraConfig
from fedra_engine.execution.dropout import DropoutKeys
from fedra_engine.execution.plan import SweepPlan, make_plan
from fedra_engine.execution.sweep_model import SweepModel
from fedra_engine.models.foundation import Foundation, make_foundation
from tests.tiny import CLASSES, DEPTH, TARGETS, TensorSamples, make_model, make_samples

CPU = torch.device("cpu")
SIZES = [3, 1, 4]
# Block 1 has all clients, block 2 one, block 3 none.
HELD = np.array([[True, True, False, False], [False, True, False, False], [True, True, True, False]])
DECODER_TARGETS = ["q_proj", "v_proj", "gate_proj", "down_proj"]


class Attention(nn.Module):
    """timm's ViT attention, by structure: one Linear for query, key and value."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(attended.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.norm, self.fc2 = nn.Linear(16, 32), nn.GELU(), nn.Identity(), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.norm(self.act(self.fc1(x))))


class LayerScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(16))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """timm's ViT block, by structure."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn, self.ls1, self.drop_path1 = nn.LayerNorm(16), Attention(), LayerScale(), nn.Identity()
        self.norm2, self.mlp, self.ls2, self.drop_path2 = nn.LayerNorm(16), Mlp(), nn.Identity(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class Output:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


class TimmLike(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Linear(16, 16)
        self.blocks = nn.Sequential(*(Block() for _ in range(DEPTH)))
        self.head = nn.Linear(16, CLASSES)

    def forward(self, pixel_values: Tensor) -> Output:
        tokens = self.patches(pixel_values.unfold(2, 4, 4).unfold(3, 4, 4).reshape(len(pixel_values), 4, 16))
        return Output(self.head(self.blocks(tokens).mean(1)))


def build(family: str) -> tuple[Foundation, TensorSamples]:
    if family == "timm":
        torch.manual_seed(0)
        model: nn.Module = TimmLike()
        targets = ["qkv", "proj", "fc2"]
    elif family in ("llama", "qwen2", "qwen3"):
        model, targets = make_decoder(family), DECODER_TARGETS
    else:
        model, targets = make_model(family), TARGETS[family]
    lora = LoraConfig(rank=3, target_modules=targets)
    samples = make_samples("bert" if family in ("llama", "qwen2", "qwen3") else "vit", sum(SIZES))
    return make_foundation(model.double(), lora, classes=CLASSES), samples


def make_decoder(family: str) -> nn.Module:
    torch.manual_seed(0)
    config_class, model_class = {
        "llama": (LlamaConfig, LlamaForSequenceClassification),
        "qwen2": (Qwen2Config, Qwen2ForSequenceClassification),
        "qwen3": (Qwen3Config, Qwen3ForSequenceClassification),
    }[family]
    config = config_class(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=DEPTH,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        vocab_size=30,
        max_position_embeddings=16,
        pad_token_id=0,
        num_labels=CLASSES,
        use_cache=False,
    )
    model = model_class(config)
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = MethodType(double_rms_norm, module)
    return model


def double_rms_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """transformers' RMSNorm rounds to float32 even in a float64 model, which would hide small errors of ours."""
    return norm.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon)


def run(foundation: Foundation, samples: TensorSamples, *, fuse: bool, dropout: float) -> tuple[int, Tensor, Tensor]:
    """How many blocks are fused, the features, and the adapters' gradients."""
    inputs = samples.inputs(torch.arange(sum(SIZES)), CPU, foundation.dtype)
    model = SweepModel(foundation, lambda n: samples.inputs(torch.arange(n), CPU, foundation.dtype), fuse_blocks=fuse)
    bank = (
        torch.randn(HELD.size, foundation.adapter_layout.size, generator=torch.Generator().manual_seed(1)).double()
        * 0.1
    )
    gradients = torch.zeros_like(bank)
    model.bind(bank, gradients)
    keys = DropoutKeys(dropout, seed=0, round=0, clients=[5, 6, 7], steps=[0, 1, 2]) if dropout else None
    features = model.features(inputs, plan(), keys)
    features.square().sum().backward()
    return model.fused, features.detach(), gradients


def plan() -> SweepPlan:
    slots = np.where(HELD, np.arange(HELD.size).reshape(HELD.shape), -1)
    return make_plan(SIZES, slots, np.arange(3), scale=2.0, dtype=torch.float64, device=CPU)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("family", ["vit", "dinov2", "timm", "llama", "qwen2", "qwen3"])
def test_fused_blocks_equal_the_unfused_sweep(family: str, dropout: float) -> None:
    foundation, samples = build(family)
    none, expected, expected_gradients = run(foundation, samples, fuse=False, dropout=dropout)
    fused, found, gradients = run(foundation, samples, fuse=True, dropout=dropout)
    assert (none, fused) == (0, DEPTH)
    assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()
    assert (gradients - expected_gradients).abs().max() <= 1e-10 * expected_gradients.abs().max()


def test_a_block_that_only_looks_like_a_known_one_is_left_alone() -> None:
    class Different(Block):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.attn(self.norm1(x)) + self.mlp(self.norm2(x))

    model = TimmLike()
    model.blocks = nn.Sequential(*(Different() for _ in range(DEPTH)))
    foundation = make_foundation(model.double(), LoraConfig(target_modules=["fc2"]), classes=CLASSES)
    fused, _, _ = run(foundation, make_samples("vit", sum(SIZES)), fuse=True, dropout=0.0)
    assert fused == 0
