"""Which blocks one op computes, and what it leaves alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedra_engine.config import LoraConfig
from fedra_engine.execution.sweep_model import SweepModel
from fedra_engine.execution.whole_block import WholeBlock, _hidden_alone
from fedra_engine.models.foundation import make_foundation
from tests.tiny import CLASSES, DEPTH, TARGETS, make_samples, make_tiny
from tests.tiny_timm import WIDTH, Attention, TimmModel, VitBlock

SAMPLES = make_samples("vit", 4)


def inputs(count: int) -> dict[str, Tensor]:
    return SAMPLES.inputs(torch.arange(count), torch.device("cpu"), torch.float64)


class Known(Attention):
    """With the names of timm's attention that the op needs."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.scale = 2, (WIDTH // 2) ** -0.5


class Normed(Known):
    """Norms of queries and keys, which the op does not compute, that change as good as nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.q_norm = nn.LayerNorm(WIDTH // 2)


class Causal(Known):
    is_causal = True


@pytest.mark.parametrize(("attention", "taken"), [(Known, True), (Normed, False), (Causal, False)])
def test_an_attention_with_more_than_its_linears_is_left_alone(attention: type[Known], taken: bool) -> None:
    blocks: list[nn.Module] = [VitBlock() for _ in range(DEPTH)]
    for block in blocks:
        block.attn = attention()
    foundation = make_foundation(
        TimmModel(blocks, CLASSES).double(), LoraConfig(target_modules=["fc2"]), classes=CLASSES
    )
    model = SweepModel(foundation, inputs, kernel_blocks=False)
    assert model.fused == (DEPTH if taken else 0)


def test_a_causal_mask_is_not_for_the_op() -> None:
    hidden = torch.zeros(2, 3, 4)
    assert _hidden_alone((hidden,), {"is_causal": False}) is hidden
    assert _hidden_alone((hidden,), {"is_causal": True}) is None
    assert _hidden_alone((hidden, hidden), {}) is None


def test_nothing_is_differentiated_below_the_first_block_with_adapters() -> None:
    lora = LoraConfig(rank=3, target_modules=TARGETS["vit"], layers_to_transform=[2])
    foundation = make_tiny("vit", lora)
    model = SweepModel(foundation, inputs)
    needs: list[bool] = []
    for block in model.blocks.children():
        assert isinstance(block, WholeBlock)
        block.register_forward_hook(
            lambda module, args, output: needs.append(module.arguments.returned_states(output).requires_grad)
        )
    adapters = torch.randn(DEPTH, foundation.adapter_layout.size, dtype=torch.float64)
    model.features_of(inputs(2), adapters, np.arange(DEPTH)[None], torch.zeros_like(adapters))
    model.end_pass()
    assert needs == [False, False, True, True]
