"""A merged model of some blocks is what transformers loads from its folder, and what was tuned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from fedra_engine.config import ModelConfig
from fedra_engine.exports import merged_model
from fedra_engine.exports.loading_lines import merged_loading_lines, model_class
from fedra_engine.exports.merged_model import Part, save_merged
from fedra_engine.models.foundation import Foundation
from fedra_engine.models.loading import PooledClassifier, load_pretrained
from fedra_engine.models.state import GlobalState
from fedra_engine.runtime.errors import InputError
from tests.exports.trained import IMAGES, NAMES, assert_same_predictions, loading_only, logits, trained
from tests.tiny import CLASSES, DEPTH, FAMILIES

# Neither the stand-ins for timm's models nor DeBERTa's relatives.
LOADED = [family for family in FAMILIES if not family.startswith("timm_")]


def part_of(state: GlobalState, blocks: list[int]) -> Part:
    return Part(np.array(blocks), state.adapters[blocks], state.heads[0])


def saved(folder: Path, family: str, blocks: list[int], **model: Any) -> tuple[Foundation, torch.Tensor, Any]:
    """The foundation, what the sweep over `blocks` predicts, and the inputs that it got."""
    config, foundation, state = trained(folder / "model", family, **model)
    expected, inputs = logits(foundation, state, family, blocks)
    names = NAMES[: foundation.head_layout.classes]
    save_merged(folder, foundation, config, part_of(state, blocks), classes=names, inputs=inputs)
    return foundation, expected, inputs


@pytest.mark.parametrize("family", LOADED)
@pytest.mark.parametrize("blocks", [[0, 1, 2, 3], [0, 3]])
def test_the_documented_lines_load_what_was_tuned(
    tmp_path: Path, family: str, blocks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also a sub-model, whose blocks may be of several kinds."""
    foundation, expected, inputs = saved(tmp_path, family, blocks)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(loading_only(merged_loading_lines(foundation, IMAGES)), names)
    with torch.no_grad():
        assert_same_predictions(names["logits"](**inputs), expected, inputs)


@pytest.mark.parametrize(("family", "classes"), [("vit", CLASSES + 2), ("clip", CLASSES), ("llama", CLASSES + 2)])
def test_it_names_its_classes(tmp_path: Path, family: str, classes: int) -> None:
    foundation, _, _ = saved(tmp_path, family, [0, 2], classes=classes)
    model = getattr(transformers, model_class(foundation)).from_pretrained(tmp_path)
    assert model.config.id2label == dict(enumerate(NAMES[:classes]))
    assert model.config.label2id["eel"] == 4


def test_a_language_model_keeps_its_cache(tmp_path: Path) -> None:
    saved(tmp_path, "llama_lm", [0, 1, 2, 3])
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.config.use_cache
    assert len(model.generate(torch.tensor([[3, 4]]), max_new_tokens=2, min_new_tokens=2)[0]) == 4


@pytest.mark.parametrize("pooling", ["first", "mean", "last"])
def test_a_pooled_classifier_can_be_tuned_on(tmp_path: Path, pooling: Any) -> None:
    _, expected, inputs = saved(tmp_path, "bert", [0, 2, 3], pooling=pooling)
    with torch.no_grad():
        model = load_pretrained(ModelConfig(path=str(tmp_path)), classes=CLASSES)
        assert isinstance(model, PooledClassifier)
        assert model.pooling == pooling
        assert_same_predictions(model(**inputs).logits, expected, inputs)
        assert load_pretrained(ModelConfig(path=str(tmp_path)), classes=3)(**inputs).logits.shape == (4, 3)


def test_the_frozen_model_stays_as_it_is(tmp_path: Path) -> None:
    config, foundation, state = trained(tmp_path / "model", "qwen2")
    before = {name: tensor.clone() for name, tensor in foundation.model.state_dict().items()}
    settings: Any = foundation.model.config
    kinds = [*settings.layer_types]
    _, inputs = logits(foundation, state, "qwen2", range(DEPTH))
    save_merged(tmp_path, foundation, config, part_of(state, [1, 2]), classes=NAMES[:CLASSES], inputs=inputs)
    assert all(torch.equal(before[name], tensor) for name, tensor in foundation.model.state_dict().items())
    assert (settings.num_hidden_layers, settings.layer_types) == (DEPTH, kinds)


def test_a_model_that_its_configuration_cannot_describe_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merged_model, "_describe", lambda *_: None)
    with pytest.raises(InputError, match=r"^export: found other logits in a saved ViTForImageClassification of 2 of 4"):
        saved(tmp_path, "vit", [0, 3])
