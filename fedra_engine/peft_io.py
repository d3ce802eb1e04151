"""Save the global adapter in PEFT's format, so that `peft.PeftModel.from_pretrained` loads it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from peft import LoraConfig as PeftLoraConfig
from safetensors.torch import save_file
from torch import Tensor

from fedra_engine.config import ExperimentConfig
from fedra_engine.models.foundation import Foundation
from fedra_engine.models.loading import resolve_model_path
from fedra_engine.models.pooling import PooledClassifier
from fedra_engine.models.state import GlobalState, head_tensors

_PREFIX = "base_model.model"


def save_private(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write `private.safetensors`: what clients keep to themselves, `blocks.<client>` and `factors.<client>`."""
    save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, folder / "private.safetensors")


def save_adapter(folder: Path, foundation: Foundation, config: ExperimentConfig, state: GlobalState) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` (adapters of all blocks, and the head if trained).

    What the pretrained model has no place for gets files of its own: the head of a `PooledClassifier`
    (`head.safetensors`), the classifiers of early exits (`exits.safetensors`), and weights of the model that a method
    has rewritten (`base_weights.safetensors`, under their names in the model).
    """
    layout = foundation.adapter_layout
    # The model to adapt is the one at `model.path`, without what this package puts around it.
    pooling = foundation.model.pooling if isinstance(foundation.model, PooledClassifier) else None
    block_path = foundation.block_path.removeprefix("backbone.") if pooling else foundation.block_path
    tensors = {
        f"{_PREFIX}.{block_path}.{block}.{name}.weight": factor.contiguous().cpu()
        for block, slot in enumerate(state.adapters)
        for name, factor in layout.named_factors(slot)
    }
    named = head_tensors([0], state.heads[-1:], foundation.head_layout, exits=1)
    head = {name.removeprefix("head."): tensor.cpu() for name, tensor in named.items()}
    folder.mkdir(parents=True, exist_ok=True)
    if pooling:
        save_file(head, folder / "head.safetensors", metadata={"pooling": pooling})
        head = {}
    if head:
        # PEFT finds modules by the end of their names. It would take these for saved, too, and miss them; DistilBERT's
        # `pre_classifier` is one.
        tensors |= {f"{_PREFIX}.{name}": kept.contiguous().cpu() for name, kept in foundation.namesakes.items()}
    tensors |= {f"{_PREFIX}.{foundation.head_path}.{name}": tensor for name, tensor in head.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    if len(state.heads) > 1:
        early = head_tensors(
            range(len(state.heads) - 1), state.heads[:-1], foundation.head_layout, exits=len(state.heads)
        )
        save_file({name: tensor.cpu() for name, tensor in early.items()}, folder / "exits.safetensors")
    if state.base:
        base = {
            f"{block_path}.{block}.{target.path}.weight": (weight.T if foundation.stores_input_first else weight)
            .contiguous()
            .cpu()
            for target, weights in zip(layout.targets, state.base, strict=True)
            for block, weight in enumerate(weights)
        }
        save_file(base, folder / "base_weights.safetensors")
    PeftLoraConfig(
        base_model_name_or_path=resolve_model_path(config.model.path),
        r=config.lora.rank,
        lora_alpha=config.lora.alpha,
        lora_dropout=config.lora.dropout,
        fan_in_fan_out=foundation.stores_input_first,
        target_modules=[
            f"{block_path}.{block}.{target.path}" for block in range(foundation.depth) for target in layout.targets
        ],
        modules_to_save=[foundation.head_path] if head else None,
        inference_mode=True,
    ).save_pretrained(str(folder))
