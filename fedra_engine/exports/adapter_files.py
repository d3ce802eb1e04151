"""Save the tuned adapter in PEFT's format, with all that is needed to load and use it without this package."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from fedra_engine.callback import Outcome
from fedra_engine.config import ExperimentConfig, LoraConfig
from fedra_engine.experiment import Experiment
from fedra_engine.exports.loading_lines import base_model, has_own_head, pooling_of
from fedra_engine.exports.model_card import adapter_card
from fedra_engine.exports.processor_files import save_processor
from fedra_engine.methods.products import decompose, factor_products
from fedra_engine.models.adapters import AdapterLayout
from fedra_engine.models.foundation import Foundation
from fedra_engine.models.loading import HEAD_FILE, own_path, without_pooling
from fedra_engine.models.state import GlobalState, head_tensors
from fedra_engine.runtime.files import whole_files, write_whole

_PREFIX = "base_model.model"


def export(
    folder: Path, experiment: Experiment, state: GlobalState, outcome: Outcome, *, best_by: str | None = None
) -> None:
    """Write the adapter, its card, the image processor or tokenizer, and private factors, if clients have any.

    Each file appears whole or not at all. The card says so if the `state` is that of the best round by a measure,
    `best_by`.
    """
    method, foundation, config = experiment.method, experiment.foundation, experiment.config
    depth, classes = len(method.evaluated_model().blocks), experiment.train_data.classes
    with whole_files(folder) as made:
        loaded = experiment.initial_state.base
        save_adapter(made, foundation, config, state, depth=depth, classes=classes, loaded_base=loaded)
        save_processor(made, experiment.processing, experiment.train_data.task)
        if method.personal_states(state) is not None:
            private = {name: tensor.contiguous().cpu() for name, tensor in method.tensors().items()}
            save_file(private, made / "private.safetensors")
        write_whole(made / "README.md", adapter_card(experiment, outcome, best_by))


def save_adapter(
    folder: Path,
    foundation: Foundation,
    config: ExperimentConfig,
    state: GlobalState,
    *,
    depth: int,
    classes: Sequence[str] = (),
    loaded_base: tuple[Tensor, ...] = (),
) -> None:
    """Write the adapters of the first `depth` blocks and the trained head in PEFT's format.

    Where the method has changed frozen weights, the adapters include their change since `loaded_base`. The names of the
    `classes` go into `labels.json`. Classifiers for which the pretrained model has no module get files of their own:
    the head of a `PooledClassifier` (`head.safetensors`) and those of early exits (`exits.safetensors`).
    """
    layout, adapters = foundation.adapter_layout, state.adapters
    if state.base:
        layout, adapters = _with_change_of_base(layout, state, loaded_base)
    block_path = own_path(foundation.model, foundation.block_path)
    adapted = np.flatnonzero(foundation.adapted[:depth]).tolist()
    tensors = {
        f"{_PREFIX}.{block_path}.{block}.{name}.weight": factor.contiguous().cpu()
        for block in adapted
        for name, factor in layout.named_factors(adapters[block])
    }
    folder.mkdir(parents=True, exist_ok=True)
    tensors |= _save_heads(folder, foundation, state.heads)
    if foundation.task.trains_head:
        (folder / "labels.json").write_text(json.dumps(list(classes), indent=2) + "\n")
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {
        # What PEFT takes for a setting that is missing may change; those that decide what the adapter does are written.
        "peft_type": "LORA",
        "base_model_name_or_path": base_model(config),
        **_task(foundation, config),
        **_ranks_and_scales(layout, config.lora, block_path),
        "target_modules": [f"{block_path}.{b}.{target.path}" for b in adapted for target in layout.targets],
        "modules_to_save": _modules_to_save(foundation),
        "lora_dropout": config.lora.dropout,
        "fan_in_fan_out": foundation.stores_input_first,
        "bias": "none",
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _ranks_and_scales(layout: AdapterLayout, lora: LoraConfig, block_path: str) -> dict[str, Any]:
    """The settings by which PEFT gives each target its rank and scale; patterns only where targets differ."""
    # Of 16 digits, the last is that of rounding.
    alphas = [float(f"{t.scale * (math.sqrt(t.rank) if lora.use_rslora else t.rank):.15g}") for t in layout.targets]
    settings: dict[str, Any] = {"r": layout.rank, "lora_alpha": alphas[0], "use_rslora": lora.use_rslora}
    paths = [rf"{re.escape(block_path)}\.\d+\.{re.escape(t.path)}" for t in layout.targets]
    ranks = {path: t.rank for path, t in zip(paths, layout.targets, strict=True) if t.rank != layout.rank}
    return settings | {
        "rank_pattern": ranks,
        "alpha_pattern": {path: alpha for path, alpha in zip(paths, alphas, strict=True) if alpha != alphas[0]},
    }


def _modules_to_save(foundation: Foundation) -> list[str] | None:
    """The paths of the modules that PEFT saves beside adapters: the head, and the norm if that is trained."""
    paths = [foundation.saved_path] if has_own_head(foundation) else []
    paths += [] if foundation.norm_path is None else [foundation.norm_path]
    return [own_path(foundation.model, path) for path in paths] or None


def _save_heads(folder: Path, foundation: Foundation, heads: Tensor) -> dict[str, Tensor]:
    """Write the `heads` that have files of their own. Returns what PEFT saves of the model's own, by PEFT's names.

    Norms are among these.
    """
    layout, exits, pooling = foundation.head_layout, len(heads), pooling_of(foundation)
    if exits > 1:
        early = head_tensors(range(exits - 1), heads[:-1], layout, exits=exits)
        save_file({name: tensor.cpu() for name, tensor in early.items()}, folder / "exits.safetensors")
    last = head_tensors([0], heads[-1:], layout, exits=1)
    places = {"head": foundation.head_path, "norm": foundation.norm_path}
    parts = {kind: {n.rpartition(".")[2]: t.cpu() for n, t in last.items() if n.startswith(kind)} for kind in places}
    if pooling is not None:
        save_file(parts.pop("head"), folder / HEAD_FILE, metadata={"pooling": pooling})
    own = {f"{places[kind]}.{name}": tensor for kind, part in parts.items() for name, tensor in part.items()}
    saved = (dict(foundation.saved_beside) if has_own_head(foundation) else {}) | own
    return {
        f"{_PREFIX}.{own_path(foundation.model, name)}": tensor.contiguous().cpu() for name, tensor in saved.items()
    }


def _task(foundation: Foundation, config: ExperimentConfig) -> dict[str, Any]:
    """The settings by which PEFT's auto classes find the class of the base model; PEFT has no task type for images."""
    model = without_pooling(foundation.model)
    if model.main_input_name != "pixel_values":
        kind = "FEATURE_EXTRACTION" if pooling_of(foundation) else foundation.task.peft_type
        return {"task_type": kind}
    if base_model(config) is None:
        return {}
    return {"auto_mapping": {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}}


def _with_change_of_base(
    layout: AdapterLayout, state: GlobalState, loaded: tuple[Tensor, ...]
) -> tuple[AdapterLayout, Tensor]:
    """Adapters of scale 1, and their layout, that equal the state's adapters plus the change of its frozen weights.

    The change is that from the `loaded` weights. The rank is the least whose error is below their rounding.
    """
    changes = [
        after.double() - before.double() + target.scale * product
        for target, after, before, product in zip(
            layout.targets, state.base, loaded, factor_products(state.adapters, layout), strict=True
        )
    ]
    rounding = [torch.finfo(weights.dtype).eps * weights.double().norm(dim=(1, 2)) for weights in state.base]
    rank = max(
        int((torch.linalg.svdvals(change) > least[:, None]).sum(1).max())
        for change, least in zip(changes, rounding, strict=True)
    )
    merged = AdapterLayout(tuple(replace(target, rank=max(rank, 1), scale=1.0) for target in layout.targets))
    return merged, decompose(changes, merged).to(state.adapters)
