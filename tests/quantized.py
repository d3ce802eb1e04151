"""Tiny models whose blocks bitsandbytes has quantized."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from fedra_engine.config import LoraConfig, ModelConfig
from fedra_engine.models.foundation import Foundation, make_foundation
from fedra_engine.models.loading import load_pretrained, without_pooling
from tests.tiny import CLASSES, FAMILIES, TARGETS, make_model


def quantized_foundation(
    family: str, load_in: Any, dtype: Any = "float32", lora: LoraConfig | None = None
) -> Foundation:
    """A tiny model with random weights, loaded as `model.load_in` asks."""
    model, classes = make_model(family), None if FAMILIES[family].causal_lm else CLASSES
    with tempfile.TemporaryDirectory() as folder:
        without_pooling(model).save_pretrained(Path(folder))
        loaded = load_pretrained(ModelConfig(path=folder, dtype=dtype, load_in=load_in), classes=classes)
    return make_foundation(loaded, lora or LoraConfig(target_modules=TARGETS[family]), classes=classes)
