"""Which weights are quantized, what says that they cannot be, and what is known of them."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from fedra_engine.callbacks.fingerprint import _of_model
from fedra_engine.config import LoraConfig, ModelConfig, TrainingConfig
from fedra_engine.costs.model import CostModel, _bytes, measure_block_flops
from fedra_engine.federation.assignment import Assignment
from fedra_engine.models.foundation import cut_to_blocks, make_foundation
from fedra_engine.models.loading import adopt_model, load_pretrained
from fedra_engine.models.quantization import has_quantized_weight, scales_of
from fedra_engine.models.structure import is_linear, linear_shape
from fedra_engine.runtime.errors import InputError
from tests.quantized import quantized_foundation
from tests.tiny import CLASSES, DEPTH, TARGETS, make_model, make_samples, make_tiny

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", ["vit", "clip", "bert", "roberta", "distilbert", "gpt2", "dinov3", "llama_lm"])
@pytest.mark.parametrize(("load_in", "kind"), [("8bit", "Linear8bitLt"), ("4bit", "Linear4bit")])
def test_the_linears_of_the_blocks_are_quantized_and_no_others(family: str, load_in: str, kind: str) -> None:
    """Also where transformers would quantize others, such as layers before the head, by itself."""
    foundation = quantized_foundation(family, load_in)
    linears = {name: part for name, part in foundation.model.named_modules() if is_linear(part)}
    inside = {name for name in linears if name.startswith(f"{foundation.block_path}.")}
    assert {name for name, part in linears.items() if has_quantized_weight(part)} == inside
    assert {type(linears[name]).__name__ for name in inside} == {kind}
    assert foundation.dtype == torch.float32
    plain = make_tiny(family, LoraConfig(target_modules=TARGETS[family]), torch.float32)
    assert foundation.adapter_layout == plain.adapter_layout


@pytest.mark.parametrize("load_in", ["8bit", "4bit"])
def test_sub_models_share_the_weights_of_the_whole(load_in: str) -> None:
    """Also what the layers keep outside of their parameters."""
    foundation = quantized_foundation("vit", load_in)
    foundation.model(**make_samples("vit", 2).inputs(torch.arange(2), CPU, torch.float32))
    cut = cut_to_blocks(foundation, [1, 3]).get_submodule(foundation.block_path)
    assert cut[0].get_submodule("mlp.fc1") is foundation.blocks[1].get_submodule("mlp.fc1")


@pytest.mark.parametrize(("family", "load_in"), [("vit", "8bit"), ("vit", "4bit"), ("llama", "4bit"), ("gpt2", "8bit")])
def test_costs_count_the_bytes_of_the_codes_and_the_products_of_plain_weights(family: str, load_in: str) -> None:
    lora = LoraConfig(target_modules=TARGETS[family])
    quantized, plain = quantized_foundation(family, load_in, lora=lora), make_tiny(family, lora, torch.float32)
    samples = make_samples(family, 6)
    found, expected = (measure_block_flops(foundation, samples) for foundation in (quantized, plain))
    for name, values in vars(found).items():
        np.testing.assert_array_equal(values, getattr(expected, name))
    linears = [part for part in plain.blocks[0].modules() if is_linear(part)]
    weights = sum(linear.weight.numel() for linear in linears)
    others = sum(p.numel() for p in plain.blocks[0].parameters()) - weights
    codes = weights if load_in == "8bit" else weights // 2
    scales = _bytes(quantized.blocks[0]) - codes - 4 * others
    # A float32 for each output, or for 64 weights; beside them the 16 values of NF4 and a description.
    rows = sum(linear_shape(linear)[1] for linear in linears)
    assert scales >= 4 * (rows if load_in == "8bit" else weights // 64)
    assert scales <= 4 * rows + len(linears) * 300
    whole = Assignment(np.ones((1, DEPTH), dtype=np.bool_))
    assert CostModel(quantized, samples, lora, TrainingConfig())._activation_bytes(whole) > 0


@pytest.mark.parametrize("load_in", ["8bit", "4bit"])
def test_the_fingerprint_knows_codes_and_scales(load_in: str) -> None:
    foundation = quantized_foundation("vit", load_in)
    before = list(_of_model(foundation.model))
    foundation.model(**make_samples("vit", 2).inputs(torch.arange(2), CPU, torch.float32))
    assert list(_of_model(foundation.model)) == before
    layer = foundation.blocks[2].get_submodule("mlp.fc1")
    for tensor in (layer.weight, next(s for s in scales_of(layer).values() if s.is_floating_point())):
        tensor.data.view(torch.uint8).view(-1)[0] ^= 1
        after = list(_of_model(foundation.model))
        assert sum(a != b for a, b in zip(before, after, strict=True)) == 1
        before = after


def test_without_bitsandbytes_the_option_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model("vit").save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    message = r"^model\.load_in: found 4bit, but cannot import bitsandbytes \(.*\), expected .*fedra-engine\[bitsandby"
    with pytest.raises(InputError, match=message):
        load_pretrained(ModelConfig(path=str(tmp_path), load_in="4bit"), classes=CLASSES)


def test_a_device_that_it_does_not_know_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("bitsandbytes")
    module.supported_torch_devices = {"cuda", "xpu"}
    monkeypatch.setitem(sys.modules, "bitsandbytes", module)
    with pytest.raises(InputError, match=r"^model\.load_in: found 8bit on a device of type cpu, .*cuda, xpu"):
        load_pretrained(ModelConfig(path=str(tmp_path), load_in="8bit"), classes=CLASSES)


def test_weights_that_are_quantized_in_the_files_are_refused(tmp_path: Path) -> None:
    make_model("vit").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": quantization}))
    with pytest.raises(InputError, match=r"^model\.path: found quantized weights .* \(model\.load_in quantizes them\)"):
        load_pretrained(ModelConfig(path=str(tmp_path)), classes=CLASSES)


def test_a_model_in_memory_is_neither_quantized_nor_taken_if_it_is() -> None:
    with pytest.raises(InputError, match=r"^model\.load_in: found 8bit with a model in memory"):
        adopt_model(make_model("vit"), ModelConfig(load_in="8bit"))
    with pytest.raises(InputError, match=r"^model: found quantized weights in memory"):
        adopt_model(quantized_foundation("vit", "8bit").model, ModelConfig())


def test_methods_that_rewrite_the_weights_are_refused() -> None:
    with pytest.raises(InputError, match=r"^method\.name: found one that rewrites the weights .* are quantized"):
        quantized_foundation("vit", "4bit").base()


def test_a_given_block_path_is_that_of_the_model_with_its_pooling(tmp_path: Path) -> None:
    make_model("dinov3").backbone.save_pretrained(tmp_path)
    config = ModelConfig(path=str(tmp_path), load_in="4bit")
    loaded = load_pretrained(config, classes=CLASSES)
    path = make_foundation(loaded, LoraConfig(target_modules=["o_proj"]), classes=CLASSES).block_path
    loaded = load_pretrained(replace(config, block_path=path), classes=CLASSES)
    assert any(has_quantized_weight(part) for part in loaded.get_submodule(path).modules())
