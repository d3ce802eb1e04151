"""What is saved is what PEFT loads onto the pretrained model, whatever that is and however many classes it has."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import linear

from fedra_engine.config import ExperimentConfig, ModelConfig
from fedra_engine.exports.adapter_files import save_adapter
from fedra_engine.exports.loading_lines import has_own_head, loading_lines, model_class, peft_class
from fedra_engine.models.loading import Pooling
from tests.exports.trained import IMAGES, LORA, NAMES, assert_same_predictions, loading_only, logits, trained
from tests.tiny import CLASSES, DEPTH, FAMILIES, make_model


@torch.no_grad()
def reloaded(folder: Path, lines: str, inputs: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """The logits that the documented `lines` give in `folder`."""
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(lines, names)
    return names["logits"](**inputs)


def assert_comes_back(folder: Path, family: str, monkeypatch: pytest.MonkeyPatch, depth: int, **made: Any) -> None:
    config, foundation, state = trained(folder / "model", family, **made)
    expected, inputs = logits(foundation, state, family, range(depth))
    save_adapter(folder, foundation, config, state, depth=depth, classes=NAMES[: foundation.head_layout.classes])
    found = reloaded(folder, loading_only(loading_lines(foundation, config, depth, IMAGES)), inputs, monkeypatch)
    assert_same_predictions(found, expected, inputs)


# The stand-ins for timm's models have nothing that transformers could load.
@pytest.mark.parametrize("family", [family for family in FAMILIES if not family.startswith("timm_")])
def test_the_documented_lines_load_what_was_evaluated(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where that is a model of only the first blocks."""
    assert_comes_back(tmp_path, family, monkeypatch, DEPTH - 1)


@pytest.mark.parametrize(
    "rules",
    [
        {"use_rslora": True},
        {"alpha_pattern": {"fc2": 1.5}},
        {"use_rslora": True, "rank_pattern": {"o_proj": 1, "fc.": 5}},
    ],
)
def test_ranks_and_scales_of_single_targets_come_back(
    tmp_path: Path, rules: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_comes_back(tmp_path, "vit", monkeypatch, DEPTH, lora=replace(LORA["vit"], **rules))


@pytest.mark.parametrize("family", ["bert", "vit"])
@pytest.mark.parametrize("pooling", ["first", "mean", "last"])
def test_they_pool_as_the_run_did(
    tmp_path: Path, family: str, pooling: Pooling, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_comes_back(tmp_path, family, monkeypatch, DEPTH, pooling=pooling)


@pytest.mark.parametrize(("tokens", "is_padded"), [(299, True), (300, False)])
def test_the_last_of_many_tokens_is_found_in_any_precision(tmp_path: Path, tokens: int, is_padded: bool) -> None:
    """bfloat16 has no whole numbers between 298 and 300."""
    config, foundation, _ = trained(tmp_path / "model", "bert", pooling="last")
    lines = loading_only(loading_lines(foundation, config, DEPTH, IMAGES))
    states = torch.zeros(1, 300, 2, dtype=torch.bfloat16)
    states[0, tokens - 1] = 1
    names: dict[str, Any] = {
        "torch": torch,
        "model": lambda **_: SimpleNamespace(last_hidden_state=states),
        "head": {"weight": torch.eye(2), "bias": torch.zeros(2)},
    }
    exec(lines[lines.index("def logits") :], names)
    inputs = {"attention_mask": (torch.arange(300) < tokens)[None].long()} if is_padded else {}
    assert names["logits"](**inputs).tolist() == [[1.0, 1.0]]


# With RoBERTa and DistilBERT, PEFT saves more than the last Linear.
@pytest.mark.parametrize("family", ["vit", "dinov2", "bert", "roberta", "distilbert", "llama"])
def test_the_model_has_another_number_of_classes_than_the_data(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_comes_back(tmp_path, family, monkeypatch, DEPTH, classes=CLASSES + 2)


@pytest.mark.parametrize(
    "family", ["vit", "dinov2", "dinov3", "clip", "bert", "roberta", "distilbert", "llama", "gpt2_lm"]
)
@pytest.mark.parametrize("more", [0, 2])
@torch.no_grad()
def test_the_auto_classes_of_peft_load_it(tmp_path: Path, family: str, more: int) -> None:
    """So do those of transformers; without arguments, where the model has as many classes as the data."""
    config, foundation, state = trained(tmp_path / "model", family, classes=CLASSES + more)
    expected, inputs = logits(foundation, state, family, range(DEPTH))
    save_adapter(tmp_path, foundation, config, state, depth=DEPTH, classes=NAMES[: CLASSES + more])
    labels: dict[str, Any] = {}
    if more and has_own_head(foundation):
        labels = {"id2label": dict(enumerate(NAMES)), "ignore_mismatched_sizes": True}
    model = getattr(peft, peft_class(foundation)).from_pretrained(str(tmp_path), **labels)
    output = model.eval()(**inputs)
    if has_own_head(foundation) or family == "gpt2_lm":
        found = output.logits
    else:
        head = load_file(tmp_path / "head.safetensors")
        found = linear(output.pooler_output, head["weight"], head["bias"])
    assert_same_predictions(found, expected, inputs)
    if has_own_head(foundation) or family == "gpt2_lm":
        own = getattr(transformers, model_class(foundation)).from_pretrained(str(tmp_path), **labels)
        assert_same_predictions(own.eval()(**inputs).logits, expected, inputs)


def test_texts_in_mean_pooling_are_features_to_peft(tmp_path: Path) -> None:
    config, foundation, state = trained(tmp_path / "model", "bert", pooling="mean")
    save_adapter(tmp_path, foundation, config, state, depth=DEPTH, classes=NAMES[:CLASSES])
    assert peft_class(foundation) == "AutoPeftModelForFeatureExtraction"
    model = peft.AutoPeftModelForFeatureExtraction.from_pretrained(str(tmp_path))
    assert type(model.get_base_model()).__name__ == "BertModel"


@pytest.mark.parametrize("family", ["vit", "bert"])
def test_the_loaded_model_names_its_classes(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, foundation, state = trained(tmp_path / "model", family, classes=CLASSES + 2)
    save_adapter(tmp_path, foundation, config, state, depth=DEPTH, classes=NAMES)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(loading_only(loading_lines(foundation, config, DEPTH, IMAGES)), names)
    assert names["model"].config.id2label == dict(enumerate(NAMES))
    assert names["model"].config.label2id["gnu"] == 6


def test_a_decoder_without_a_padding_token_gets_the_one_it_was_tuned_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model("llama").save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pad_token_id": None}))
    assert_comes_back(tmp_path, "llama", monkeypatch, DEPTH)


def test_a_pooled_head_stands_beside_the_adapter(tmp_path: Path) -> None:
    config, foundation, state = trained(tmp_path / "model", "dinov3")
    save_adapter(tmp_path, foundation, config, state, depth=DEPTH)
    with safe_open(tmp_path / "head.safetensors", "pt") as file:
        assert file.metadata() == {"pooling": "pooler"}
        assert torch.equal(file.get_tensor("weight"), foundation.head_layout.weight(state.heads[0]))
        assert torch.equal(file.get_tensor("bias"), foundation.head_layout.bias(state.heads[0]))


def test_the_base_model_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, foundation, state = trained(tmp_path / "model", "vit")
    monkeypatch.chdir(tmp_path)
    for path, expected in [("model", str(tmp_path / "model")), ("owner/model", "owner/model")]:
        config = ExperimentConfig(model=ModelConfig(path=path), lora=LORA["vit"])
        save_adapter(tmp_path / "adapters", foundation, config, state, depth=DEPTH)
        settings = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
        assert settings["base_model_name_or_path"] == expected


def test_peft_reads_every_setting_that_is_written(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    config, foundation, state = trained(tmp_path / "model", "vit")
    save_adapter(tmp_path, foundation, config, state, depth=DEPTH)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    read = peft.LoraConfig.from_pretrained(str(tmp_path)).to_dict()
    assert {name: read[name] for name in written if name != "target_modules"} | {
        "target_modules": sorted(read["target_modules"])
    } == written | {"target_modules": sorted(written["target_modules"])}
    # One who builds the adapter anew, by PEFT's defaults, has the same settings.
    usual = peft.LoraConfig(peft_type="LORA", **{name: written[name] for name in ("r", "lora_alpha")}).to_dict()
    assert all(read[name] == value for name, value in usual.items() if name not in written)
    assert not recwarn.list


@pytest.mark.parametrize("family", ["vit", "gpt2"])
def test_a_change_of_the_frozen_weights_is_part_of_the_adapter(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, foundation, state = trained(tmp_path / "model", family)
    loaded = foundation.base()
    # Two ranks more than the adapters' own, which the exported ones must hold as well, and no more.
    changed = tuple(
        weights + 0.1 * torch.randn(*weights.shape[:2], 2) @ torch.randn(len(weights), 2, weights.shape[2])
        for weights in loaded
    )
    state = replace(state, base=changed)
    foundation.use_base(changed)
    expected, inputs = logits(foundation, state, family, range(DEPTH))
    names = NAMES[:CLASSES]
    save_adapter(tmp_path, foundation, config, state, depth=DEPTH, classes=names, loaded_base=loaded)
    found = reloaded(tmp_path, loading_only(loading_lines(foundation, config, DEPTH, IMAGES)), inputs, monkeypatch)
    assert_same_predictions(found, expected, inputs)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == config.lora.rank + 2
