from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import logging

from fedra_engine.config import LoraConfig, ModelConfig
from fedra_engine.models import loading
from fedra_engine.models.foundation import make_foundation
from fedra_engine.models.loading import PooledClassifier, Pooling, load_pretrained, without_pooling
from fedra_engine.runtime.errors import InputError
from tests.tiny import CLASSES, CLASSIFIERS, TARGETS, make_model, make_samples

CPU = torch.device("cpu")
POOLED = ["dinov3", "clip_vision"]
OWN_CLASSIFIER = [family for family in CLASSIFIERS if family not in (*POOLED, "timm_vit", "timm_mixer")]


def saved(folder: Path, family: str) -> ModelConfig:
    """The family's model, or what a pooled one pools, as a directory."""
    without_pooling(make_model(family)).save_pretrained(folder)
    return ModelConfig(path=str(folder))


@pytest.mark.parametrize("family", OWN_CLASSIFIER)
def test_a_classifier_loads_with_its_own_head_in_the_asked_precision(tmp_path: Path, family: str) -> None:
    model = make_model(family).to(torch.float16)
    model.save_pretrained(tmp_path)
    loaded = load_pretrained(ModelConfig(path=str(tmp_path)), classes=CLASSES)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    expected = dict(model.named_parameters())
    assert expected.keys() == dict(loaded.named_parameters()).keys()
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, expected[name].float()), name


@pytest.mark.parametrize("family", POOLED)
def test_a_model_without_classification_layers_gets_a_linear_on_its_pooled_output(tmp_path: Path, family: str) -> None:
    config = saved(tmp_path, family)
    loaded = load_pretrained(config, classes=CLASSES).eval()
    inputs = make_samples(family, 3).inputs(torch.arange(3), CPU, torch.float32)
    with torch.no_grad():
        pooled = AutoModel.from_pretrained(tmp_path).eval()(**inputs).pooler_output
        torch.testing.assert_close(loaded(**inputs).logits, loaded.classifier(pooled))
    assert make_foundation(loaded, LoraConfig(target_modules=TARGETS[family]), classes=CLASSES).depth == 4


@pytest.mark.parametrize(("family", "pooling"), [("bert", "mean"), ("roberta", "mean"), ("modernbert", "mean")])
def test_classification_layers_without_weights_give_way_to_a_pooling(tmp_path: Path, family: str, pooling: str) -> None:
    # What pretraining leaves: no pooler, no dense layer before the classifier.
    base = make_model(family).base_model
    base.pooler = None
    base.save_pretrained(tmp_path)
    loaded = load_pretrained(ModelConfig(path=str(tmp_path)), classes=CLASSES)
    assert isinstance(loaded, PooledClassifier)
    assert loaded.pooling == pooling


@pytest.mark.parametrize("family", ["gpt2", "llama", "vit"])
def test_a_base_model_gets_a_new_last_layer_only(tmp_path: Path, family: str) -> None:
    make_model(family).base_model.save_pretrained(tmp_path)
    loaded = load_pretrained(ModelConfig(path=str(tmp_path)), classes=CLASSES)
    assert not isinstance(loaded, PooledClassifier)


@pytest.mark.parametrize("family", ["gpt2_lm", "llama_lm", "qwen3_lm"])
def test_a_causal_language_model_loads_with_its_output_layer(tmp_path: Path, family: str) -> None:
    config = saved(tmp_path, family)
    foundation = make_foundation(
        load_pretrained(config, classes=None), LoraConfig(target_modules=TARGETS[family]), classes=None
    )
    expected = AutoModelForCausalLM.from_pretrained(tmp_path).get_output_embeddings().weight
    assert torch.equal(foundation.head.weight, expected)
    assert foundation.initial_heads().shape == (1, 0)


def test_poolings_read_what_they_say_whichever_side_is_padded(tmp_path: Path) -> None:
    saved(tmp_path, "llama")
    ids = torch.tensor([[5, 6, 7, 0, 0], [0, 8, 9, 10, 11]])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    with torch.no_grad():
        states = AutoModel.from_pretrained(tmp_path).eval()(**inputs).last_hidden_state
        expected = {
            "first": states[:, 0],
            "mean": torch.stack([states[0, :3].mean(0), states[1, 1:].mean(0)]),
            "last": torch.stack([states[0, 2], states[1, 4]]),
        }
        for pooling, pooled in expected.items():
            loaded = load_pretrained(ModelConfig(path=str(tmp_path), pooling=pooling), classes=CLASSES).eval()
            torch.testing.assert_close(loaded(**inputs).logits, loaded.classifier(pooled))


def test_a_pooling_that_the_model_does_not_give_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, "llama")
    loaded = load_pretrained(ModelConfig(path=str(tmp_path), pooling="pooler"), classes=CLASSES)
    with pytest.raises(
        InputError, match=r"model\.pooling: found pooler with a LlamaModel, which gives no pooler_output"
    ):
        loaded(**make_samples("llama", 2).inputs(torch.arange(2), CPU, torch.float32))


@pytest.mark.parametrize("family", ["clip", "siglip"])
@pytest.mark.parametrize("pooling", ["first", "mean", "pooler"])
def test_a_pooling_of_a_model_with_several_towers_is_refused(tmp_path: Path, family: str, pooling: Pooling) -> None:
    config = replace(saved(tmp_path, family), pooling=pooling)
    with pytest.raises(InputError, match=rf"model\.pooling: found {pooling} with a {family} .*auto, .*vision tower"):
        load_pretrained(config, classes=CLASSES)


def test_a_pooler_without_weights_is_refused(tmp_path: Path) -> None:
    base = make_model("bert").base_model
    base.pooler = None
    base.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"model\.pooling: found pooler, but no weights of pooler\.dense"):
        load_pretrained(ModelConfig(path=str(tmp_path), pooling="pooler"), classes=CLASSES)


def test_texts_are_padded_with_the_end_token_where_the_model_names_no_padding(tmp_path: Path) -> None:
    config = saved(tmp_path, "gpt2")
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"pad_token_id": None, "eos_token_id": 2}))
    assert load_pretrained(config, classes=CLASSES).config.pad_token_id == 2


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_padding_token_is_found_whatever_ends_a_text(tmp_path: Path, family: str) -> None:
    config = saved(tmp_path, family)
    settings = json.loads((tmp_path / "config.json").read_text())
    for padding in (None, -1):
        changed = settings | {"pad_token_id": padding, "eos_token_id": [2, 3]}
        (tmp_path / "config.json").write_text(json.dumps(changed))
        assert load_pretrained(config, classes=CLASSES).config.pad_token_id == 2


def test_the_last_token_is_found_in_any_precision(tmp_path: Path) -> None:
    saved(tmp_path, "llama")
    config = ModelConfig(path=str(tmp_path), pooling="last", dtype="bfloat16")
    loaded = load_pretrained(config, classes=CLASSES)
    states = torch.arange(600.0)[None, :, None].expand(1, 600, 2)
    mask = (torch.arange(600) < 300).long()[None]
    for dtype in (torch.bfloat16, torch.float32):
        last = loaded._pool(BaseModelOutput(last_hidden_state=states.to(dtype)), mask)
        assert torch.equal(last[0, 0], torch.tensor(299, dtype=dtype))


def test_a_classifier_for_other_classes_is_replaced_and_the_same_every_time(tmp_path: Path) -> None:
    config = saved(tmp_path, "vit")
    first, second = (load_pretrained(config, classes=CLASSES + 2) for _ in range(2))
    assert first.classifier.out_features == CLASSES + 2
    assert torch.equal(first.classifier.weight, second.classifier.weight)


def test_weights_that_do_not_fit_the_frozen_part_are_refused(tmp_path: Path) -> None:
    config = saved(tmp_path, "vit")
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"intermediate_size": 48}))
    with pytest.raises(InputError, match=r"model\.path: found no fitting weights .* such as vit\."):
        load_pretrained(config, classes=CLASSES)


def test_the_error_says_what_is_wrong_with_a_field_of_the_models_configuration(tmp_path: Path) -> None:
    config = saved(tmp_path, "vit")
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"hidden_size": "big"}))
    with pytest.raises(InputError, match=r"model\.path: cannot load .*'hidden_size' expected int.* 'big'") as found:
        load_pretrained(config, classes=CLASSES)
    assert "\n" not in str(found.value)


def test_a_truncated_weight_file_is_refused(tmp_path: Path) -> None:
    config = saved(tmp_path, "vit")
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(InputError, match=r"model\.path: cannot load"):
        load_pretrained(config, classes=CLASSES)


def test_a_missing_model_folder_is_named() -> None:
    with pytest.raises(InputError, match=r"model\.path: found no folder './nowhere'"):
        load_pretrained(ModelConfig(path="./nowhere"), classes=CLASSES)


def test_a_model_for_another_task_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model\.path: found a vit model, expected a causal language model"):
        load_pretrained(saved(tmp_path, "vit"), classes=None)


def test_a_pooling_is_refused_where_nothing_is_classified(tmp_path: Path) -> None:
    config = replace(saved(tmp_path, "gpt2"), pooling="mean")
    with pytest.raises(InputError, match=r"model\.pooling: found mean with a causal language model, .* expected auto"):
        load_pretrained(config, classes=None)


HUB_BARS = import_module("huggingface_hub.utils.tqdm")


@pytest.mark.parametrize("active", [True, False])
def test_loading_draws_no_bar_and_leaves_the_libraries_as_they_were(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, active: bool
) -> None:
    config = saved(tmp_path, "vit")
    capfd.readouterr()
    monkeypatch.setattr(logging, "_tqdm_active", active)
    monkeypatch.setattr(HUB_BARS, "progress_bar_states", {"_global": True, "mine.download": False})
    load_pretrained(config, classes=CLASSES)
    assert capfd.readouterr() == ("", "")
    assert logging.is_progress_bar_enabled() is active
    assert HUB_BARS.progress_bar_states == {"_global": True, "mine.download": False}
    assert logging.set_tqdm_hook(None) is None


PEFT_SPEAKS = """
import logging
import sys


class Speaker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "peft":
            logging.getLogger("bitsandbytes.backends").warning("no kernels, imported with %s", name)


sys.meta_path.insert(0, Speaker())
import fedra_engine.models.peft_library

assert "peft" in sys.modules and not logging.getLogger("bitsandbytes").level
"""


def test_nothing_is_heard_of_bitsandbytes_when_peft_is_imported() -> None:
    done = subprocess.run([sys.executable, "-c", PEFT_SPEAKS], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_timm_model_without_timm_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_tiny_patch16_224", "num_classes": 10}))

    def missing(path: str) -> None:
        raise ImportError("TimmWrapperConfig requires the timm library")

    monkeypatch.setattr(AutoConfig, "from_pretrained", missing)
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"model\.path: found a timm model .* but not the package timm"):
        load_pretrained(ModelConfig(path=str(tmp_path)), classes=CLASSES)
