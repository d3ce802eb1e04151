"""A trained norm is exported with the head: for PEFT as a module to save, in a merged model as its own norm."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fedra_engine.exports.adapter_files import save_adapter
from fedra_engine.exports.loading_lines import loading_lines, merged_loading_lines
from fedra_engine.exports.merged_model import Part, save_merged
from tests.exports.trained import IMAGES, LORA, NAMES, assert_same_predictions, loading_only, logits, trained
from tests.tiny import DEPTH

NORMS = {"vit": "layernorm", "llama": "norm", "dinov3": "norm", "gpt2_lm": "ln_f"}


@pytest.mark.parametrize("family", NORMS)
@torch.no_grad()
def test_peft_and_a_merged_model_give_the_logits(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lora = replace(LORA[family], modules_to_save=[NORMS[family]])
    config, foundation, state = trained(tmp_path / "model", family, lora=lora)
    expected, inputs = logits(foundation, state, family, range(DEPTH))
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    save_adapter(adapter, foundation, config, state, depth=DEPTH, classes=NAMES[:5])
    merged.mkdir()
    part = Part(np.arange(DEPTH), state.adapters, state.heads[0])
    save_merged(merged, foundation, config, part, classes=NAMES[:5], inputs=inputs)
    of_adapter, of_merged = loading_lines(foundation, config, DEPTH, IMAGES), merged_loading_lines(foundation, IMAGES)
    made = {adapter: loading_only(of_adapter), merged: loading_only(of_merged)}
    for folder, lines in made.items():
        monkeypatch.chdir(folder)
        names: dict[str, Any] = {}
        exec(lines, names)
        assert_same_predictions(names["logits"](**inputs), expected, inputs)
    saved = json.loads((adapter / "adapter_config.json").read_text())["modules_to_save"]
    assert foundation.norm_path is not None
    assert saved[-1] == foundation.norm_path.removeprefix("backbone.")
    assert f"base_model.model.{saved[-1]}.weight" in load_file(adapter / "adapter_model.safetensors")
