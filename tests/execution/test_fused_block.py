"""Fused blocks give what the same sweep gives without them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb

from fedra_engine.config import LoraConfig
from fedra_engine.execution.block_parts import match_parts
from fedra_engine.execution.dropout import DropoutKeys, PassDropout
from fedra_engine.execution.plan import plan_groups
from fedra_engine.execution.sweep_block import BankFactors
from fedra_engine.execution.sweep_model import SweepModel
from fedra_engine.models.foundation import Foundation, make_foundation
from tests.tiny import CLASSES, DEPTH, TARGETS, TensorSamples, make_samples, make_tiny
from tests.tiny_timm import Output, TimmModel, VitBlock

CPU = torch.device("cpu")
SIZES = [3, 1, 4]
# Block 1 has all clients, block 2 one, block 3 none.
HELD = np.array([[True, True, False, False], [False, True, False, False], [True, True, True, False]])
WHOLE = ["vit", "deit", "dinov2", "siglip", "timm_vit"]
"""Families whose blocks one op computes on a CPU."""
FUSED = ["vit", "deit", "dinov2", "dinov3", "siglip", "timm_vit", "gpt2", "llama", "qwen2", "qwen3"]


def run(
    foundation: Foundation,
    samples: TensorSamples,
    *,
    fuse: bool,
    dropout: float,
    checkpoint: bool = False,
    whole: bool = False,
) -> tuple[int, Tensor, Tensor]:
    """How many blocks are fused, the features, and the adapters' gradients."""
    inputs = samples.inputs(torch.arange(sum(SIZES)), CPU, foundation.dtype)
    model = SweepModel(
        foundation,
        lambda n: samples.inputs(torch.arange(n), CPU, foundation.dtype),
        fuse_blocks=fuse,
        checkpoint_blocks=checkpoint,
        whole_blocks=whole,
    )
    bank = (
        torch.randn(HELD.size, foundation.adapter_layout.size, generator=torch.Generator().manual_seed(1)).double()
        * 0.1
    )
    gradients = torch.zeros_like(bank)
    adapters = BankFactors(foundation.adapter_layout, bank, gradients)
    slots = np.where(HELD, np.arange(HELD.size).reshape(HELD.shape), -1)
    plan = plan_groups(foundation, SIZES, slots)
    drops = PassDropout(dropout, plan, len(foundation.adapter_layout.targets)) if dropout else None
    if drops is not None:
        drops.set_keys(DropoutKeys(dropout, seed=0, round=0, clients=[5, 6, 7], steps=[0, 1, 2]))
    features = model.features(inputs, plan, adapters, drops)
    # Of norms of features alone the gradient would almost vanish, and be of rounding.
    (features * torch.linspace(-1, 1, features.numel(), dtype=features.dtype).view(features.shape)).sum().backward()
    return model.fused, features.detach(), gradients


@pytest.mark.parametrize(("dropout", "checkpoint"), [(0.0, False), (0.3, False), (0.3, True)])
@pytest.mark.parametrize(("family", "whole"), [*((name, False) for name in FUSED), *((name, True) for name in WHOLE)])
def test_fused_blocks_equal_the_unfused_sweep(family: str, whole: bool, dropout: float, checkpoint: bool) -> None:
    foundation = make_tiny(family, LoraConfig(rank=3, target_modules=TARGETS[family]))
    samples = make_samples(family, sum(SIZES))
    none, expected, expected_gradients = run(foundation, samples, fuse=False, dropout=dropout)
    fused, found, gradients = run(foundation, samples, fuse=True, dropout=dropout, checkpoint=checkpoint, whole=whole)
    assert (none, fused) == (0, DEPTH)
    assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()
    assert (gradients - expected_gradients).abs().max() <= 1e-10 * expected_gradients.abs().max()


def test_the_names_of_older_dinov2_blocks_are_known() -> None:
    features = ("query", "key", "value")
    attention = nn.ModuleDict(
        {"attention": nn.ModuleDict({name: nn.Linear(4, 4) for name in features}), "output": nn.Linear(4, 4)}
    )
    scale = nn.Module()
    scale.lambda1 = nn.Parameter(torch.ones(4))
    block = nn.ModuleDict(
        {
            "norm1": nn.LayerNorm(4),
            "attention": attention,
            "layer_scale1": scale,
            "drop_path": nn.Identity(),
            "norm2": nn.LayerNorm(4),
            "mlp": nn.ModuleDict({"fc1": nn.Linear(4, 8), "activation": nn.GELU(), "fc2": nn.Linear(8, 4)}),
            "layer_scale2": scale,
        }
    )
    parts = match_parts(block)
    assert parts is not None
    assert list(parts.attention_inputs) == [attention["attention"][name] for name in features]
    assert parts.mlp_output is block["mlp"]["fc2"]


def test_a_block_that_only_looks_like_a_known_one_is_left_alone() -> None:
    class Different(VitBlock):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.attn(self.norm1(x)) + self.mlp(self.norm2(x))

    model = TimmModel([Different() for _ in range(DEPTH)], CLASSES)
    foundation = make_foundation(model.double(), LoraConfig(target_modules=["fc2"]), classes=CLASSES)
    fused, _, _ = run(foundation, make_samples("vit", sum(SIZES)), fuse=True, dropout=0.0)
    assert fused == 0


def test_a_model_that_reads_a_blocks_output_again_is_not_fused() -> None:
    """A fused block overwrites its input, which is the output of the block before."""

    class ReadsTwo(TimmModel):
        def forward(self, pixel_values: Tensor) -> Output:
            patches = pixel_values.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5)
            outputs = [self.patches(patches.reshape(len(pixel_values), 4, -1))]
            for block in self.blocks:
                outputs.append(block(outputs[-1]))
            return Output(self.head(self.norm(outputs[-1] + outputs[-2]).mean(1)))

    torch.manual_seed(0)
    model = ReadsTwo([VitBlock() for _ in range(DEPTH)], CLASSES)
    foundation = make_foundation(model.double(), LoraConfig(target_modules=["fc2"]), classes=CLASSES)
    fused, _, _ = run(foundation, make_samples("vit", sum(SIZES)), fuse=True, dropout=0.0)
    assert fused == 0


def test_tied_weights_are_not_put_into_one_matrix() -> None:
    foundation = make_tiny("llama", LoraConfig(rank=3, target_modules=TARGETS["llama"]))
    first, second = (block.self_attn for block in foundation.blocks[:2])
    second.q_proj.weight = first.q_proj.weight
    fused, _, _ = run(foundation, make_samples("llama", sum(SIZES)), fuse=True, dropout=0.0)
    assert fused == DEPTH - 2


class ClampingAttention(LlamaAttention):
    """Writes over what its Linears return, which a fused block must have kept."""

    def forward(self, hidden_states: Tensor, position_embeddings: Any, attention_mask: Any = None, **_: Any) -> Any:
        shape = *hidden_states.shape[:-1], -1, self.head_dim
        linears = self.q_proj, self.k_proj, self.v_proj
        query, key, value = (linear(hidden_states).clamp_(-1, 1).view(shape).transpose(1, 2) for linear in linears)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        result = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return self.o_proj(result.transpose(1, 2).reshape(hidden_states.shape)), None


def test_an_attention_that_writes_over_its_projections_is_not_fused() -> None:
    foundation = make_tiny("llama", LoraConfig(rank=3, target_modules=TARGETS["llama"]))
    for block in foundation.blocks:
        attention: Any = block.self_attn
        attention.__class__ = ClampingAttention
    samples = make_samples("llama", sum(SIZES))
    fused, *found = run(foundation, samples, fuse=True, dropout=0.0)
    assert fused == 0
    _, *expected = run(foundation, samples, fuse=False, dropout=0.0)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
