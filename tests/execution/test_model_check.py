"""Models that a sweep would train wrongly, or not at all, are refused in a line."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from fedra_engine.config import LoraConfig
from fedra_engine.execution.model_check import nearly_equal
from fedra_engine.execution.sweep_model import SweepModel
from fedra_engine.models.foundation import make_foundation
from fedra_engine.runtime.errors import InputError
from tests.tiny import CLASSES, make_model, make_samples

CPU = torch.device("cpu")
_SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 30,
    "max_position_embeddings": 16,
    "num_labels": CLASSES,
    "pad_token_id": 0,
}
_RELATIVE = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False}
_BIGCODE = {"n_embd": 16, "n_layer": 4, "n_head": 2, "n_positions": 16, "vocab_size": 30, "pad_token_id": 0}

_MIXED = r"lora\.target_modules: found a target that is given samples of all clients at once by a "


def sweep(
    name: str, targets: list[str], *, fuse_blocks: bool = False, causal_lm: bool = False, **more: Any
) -> SweepModel:
    torch.manual_seed(0)
    model_class = getattr(transformers, name + ("ForCausalLM" if causal_lm else "ForSequenceClassification"))
    model = model_class(model_class.config_class(**more))
    classes = None if causal_lm else CLASSES
    foundation = make_foundation(model, LoraConfig(rank=3, target_modules=targets), classes=classes)
    samples = make_samples("bert", 6)
    return SweepModel(
        foundation,
        lambda n: samples.inputs(torch.arange(n), CPU, torch.float32),
        fuse_blocks=fuse_blocks,
    )


def test_a_linear_that_is_given_tokens_before_samples_is_refused() -> None:
    with pytest.raises(InputError, match=_MIXED + "Longformer"):
        sweep("Longformer", ["query"], attention_window=[4] * 4, **_SIZES)


def test_a_linear_that_is_given_what_all_samples_share_is_refused() -> None:
    with pytest.raises(InputError, match=_MIXED + "DebertaV2"):
        sweep("DebertaV2", ["key_proj"], share_att_key=True, max_relative_positions=8, **_SIZES, **_RELATIVE)
    sweep("DebertaV2", ["output.dense"], share_att_key=True, max_relative_positions=8, **_SIZES, **_RELATIVE)


def test_a_model_that_does_more_after_its_first_block_is_refused() -> None:
    convolution = {"conv_kernel_size": 3, "conv_act": "gelu", "max_relative_positions": 8}
    with pytest.raises(InputError, match=r"model\.path: found a DebertaV2.* when its first block is cut off"):
        sweep("DebertaV2", ["output.dense"], **_SIZES, **_RELATIVE, **convolution)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (2, r"model\.block_path: found that the model calls block 0 more than once"),
        (4, r"model\.path: .*cannot do with"),
    ],
)
def test_blocks_that_layers_share_are_refused(groups: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        sweep("Albert", ["query"], embedding_size=16, num_hidden_groups=groups, **_SIZES)


def test_a_model_that_reads_the_weights_of_its_head_is_refused() -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 30, "state_size": 4}
    with pytest.raises(InputError, match=r"model\.path: found a MambaForCausalLM that cannot be swept: .*weight"):
        sweep("Mamba", ["in_proj"], causal_lm=True, **sizes)


def test_a_block_of_a_known_familys_names_that_is_called_in_another_way_is_not_fused() -> None:
    assert sweep("GPTBigCode", ["c_proj"], fuse_blocks=True, num_labels=CLASSES, **_BIGCODE).fused == 0


def test_a_model_with_broken_weights_is_refused() -> None:
    model = make_model("vit")
    model.get_parameter("vit.layers.2.mlp.fc1.bias").data[0] = torch.nan
    foundation = make_foundation(model, LoraConfig(rank=3, target_modules=["fc2"]), classes=CLASSES)
    samples = make_samples("vit", 2)
    with pytest.raises(InputError, match=r"model\.path: found a ViTFor.* values which are not finite"):
        SweepModel(foundation, lambda n: samples.inputs(torch.zeros(n, dtype=torch.int64), CPU, torch.float32))


@pytest.mark.parametrize(("dtype", "equal", "different"), [(torch.float32, 5e-5, 2e-4), (torch.bfloat16, 0.02, 0.05)])
def test_results_are_nearly_equal_but_for_rounding(dtype: torch.dtype, equal: float, different: float) -> None:
    expected = torch.linspace(-2, 2, 33).to(dtype)
    for error, same in ((0.0, True), (equal, True), (different, False), (torch.nan, False)):
        found = expected.clone()
        found[16] += 2 * error
        assert nearly_equal(found, expected) is same
    assert not nearly_equal(expected[:-1], expected)
    assert nearly_equal(torch.zeros(3, dtype=dtype), torch.zeros(3, dtype=dtype))
