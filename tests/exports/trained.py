"""Tiny models with adapters and heads that have come a long way, and what they predict."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from fedra_engine.config import ExperimentConfig, LoraConfig, ModelConfig
from fedra_engine.data.preprocessing import Preprocessing
from fedra_engine.execution.plan import plan_groups
from fedra_engine.execution.sweep_block import BankFactors
from fedra_engine.execution.sweep_model import SweepModel
from fedra_engine.models.foundation import Foundation, make_foundation
from fedra_engine.models.loading import load_pretrained, without_pooling
from fedra_engine.models.state import GlobalState
from tests.tiny import CLASSES, DEPTH, FAMILIES, TARGETS, make_model, make_samples

CPU = torch.device("cpu")
IMAGES = Preprocessing(image_size=8, channels=3, mean=(0.5,) * 3, std=(0.5,) * 3)
NAMES = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu"]
"""Two more than the classes of the tiny models."""
LORA = {family: LoraConfig(rank=3, alpha=6, target_modules=targets) for family, targets in TARGETS.items()}


def trained(
    folder: Path, family: str, *, classes: int = CLASSES, lora: LoraConfig | None = None, **settings: Any
) -> tuple[ExperimentConfig, Foundation, GlobalState]:
    """A model directory at `folder`, made if missing, and a state of it for `classes` that has come a long way."""
    if not folder.exists():
        without_pooling(make_model(family)).save_pretrained(folder)
    config = ExperimentConfig(model=ModelConfig(path=str(folder), **settings), lora=lora or LORA[family])
    task_classes = None if FAMILIES[family].causal_lm else classes
    pretrained = load_pretrained(config.model, classes=task_classes)
    foundation = make_foundation(pretrained, config.lora, classes=task_classes)
    torch.manual_seed(1)
    adapters = 0.3 * torch.randn(DEPTH, foundation.adapter_layout.size)
    heads = torch.randn(1, foundation.head_layout.size)
    heads[:, foundation.head_layout.trained_size :] = 0
    return config, foundation, GlobalState(adapters, heads)


def loading_only(lines: str) -> str:
    """The Python of `loading_lines` without its example, which needs a processor in the folder."""
    return lines.rpartition("\n\n\n")[0]


@torch.no_grad()
def logits(
    foundation: Foundation, state: GlobalState, family: str, blocks: Iterable[int]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Those of the sweep over `blocks`, and the inputs it got."""
    inputs = make_samples(family, 4).inputs(torch.arange(4), CPU, torch.float32)
    model = SweepModel(foundation, lambda n: {name: tensor[:n] for name, tensor in inputs.items()})
    slots = np.where(np.isin(np.arange(DEPTH), list(blocks)), np.arange(DEPTH), -1)
    plan = plan_groups(foundation, [4], slots[None])
    layout = foundation.head_layout
    features = model.features(inputs, plan, BankFactors(foundation.adapter_layout, state.adapters))
    found = layout.scaled(features, layout.norm_parameters(state.heads[0]))
    if layout.classes == 0:
        return foundation.head(found), inputs
    return linear(found, layout.weight(state.heads[0]), layout.bias(state.heads[0])), inputs


def assert_same_predictions(found: Tensor, expected: Tensor, inputs: dict[str, Tensor]) -> None:
    """The logits of a sample's classes, or of each of its tokens; a model may give anything for padding."""
    if expected.dim() == 3:
        is_text = inputs["attention_mask"].bool()
        found, expected = found[is_text], expected[is_text]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
