"""What is tuned on quantized weights is exported as an adapter for them, and merged into weights that are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedra_engine.exports.adapter_files import save_adapter
from fedra_engine.exports.loading_lines import loading_lines, merged_loading_lines
from fedra_engine.exports.merged_model import Part, save_merged
from fedra_engine.models.quantization import is_quantized, use_training_products
from tests.exports.trained import IMAGES, NAMES, assert_same_predictions, loading_only, logits, trained
from tests.tiny import DEPTH

FAMILIES = ["vit", "gpt2", "distilbert", "dinov3", "llama_lm"]
"""Conv1D layers, a head that PEFT saves with other layers, a pooled one, and a frozen one."""


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("load_in", ["8bit", "4bit"])
@torch.no_grad()
def test_the_documented_lines_load_what_was_evaluated(
    tmp_path: Path, family: str, load_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, foundation, state = trained(tmp_path / "model", family, load_in=load_in)
    expected, inputs = logits(foundation, state, family, range(DEPTH))
    save_adapter(tmp_path, foundation, config, state, depth=DEPTH, classes=NAMES[:5])
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(loading_only(loading_lines(foundation, config, DEPTH, IMAGES)), names)
    assert is_quantized(names["model"])
    # Else bitsandbytes would round more than in the run.
    use_training_products(names["model"])
    assert_same_predictions(names["logits"](**inputs), expected, inputs)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("load_in", "blocks"), [("8bit", [0, 1, 2, 3]), ("4bit", [0, 3])])
@torch.no_grad()
def test_a_merged_model_is_what_was_tuned(
    tmp_path: Path, family: str, load_in: Any, blocks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, foundation, state = trained(tmp_path / "model", family, load_in=load_in)
    expected, inputs = logits(foundation, state, family, blocks)
    part = Part(np.array(blocks), state.adapters[blocks], state.heads[0])
    save_merged(tmp_path, foundation, config, part, classes=NAMES[:5], inputs=inputs)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(loading_only(merged_loading_lines(foundation, IMAGES)), names)
    assert not is_quantized(names["model"])
    assert_same_predictions(names["logits"](**inputs), expected, inputs)
    # The run's own model is as it was.
    assert is_quantized(foundation.model)
    assert torch.equal(logits(foundation, state, family, blocks)[0], expected)
