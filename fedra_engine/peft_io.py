"""Save the global adapter in PEFT's format, so that `peft.PeftModel.from_pretrained` loads it."""

from __future__ import annotations

from pathlib import Path

from peft import LoraConfig as PeftLoraConfig
from safetensors.torch import save_file

from fedra_engine.config import ExperimentConfig
from fedra_engine.models.foundation import Foundation, resolve_model_path
from fedra_engine.models.state import GlobalState, head_tensors

_PREFIX = "base_model.model"


def save_adapter(folder: Path, foundation: Foundation, config: ExperimentConfig, state: GlobalState) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` (adapters of all blocks, and the head)."""
    layout = foundation.adapter_layout
    tensors = {
        f"{_PREFIX}.{foundation.block_path}.{block}.{name}.weight": factor.contiguous().cpu()
        for block, slot in enumerate(state.adapters)
        for name, factor in layout.named_factors(slot)
    }
    for name, tensor in head_tensors([0], state.heads[-1:], foundation.head_layout, exits=1).items():
        tensors[f"{_PREFIX}.{foundation.head_path}.{name.removeprefix('head.')}"] = tensor.cpu()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    PeftLoraConfig(
        base_model_name_or_path=resolve_model_path(config.model.path),
        r=config.lora.rank,
        lora_alpha=config.lora.alpha,
        lora_dropout=config.lora.dropout,
        target_modules=[
            f"{foundation.block_path}.{block}.{target.path}"
            for block in range(foundation.depth)
            for target in layout.targets
        ],
        modules_to_save=[foundation.head_path],
        inference_mode=True,
    ).save_pretrained(str(folder))
