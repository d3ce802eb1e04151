"""A client's real sub-model: the foundation cut to the blocks it holds, with PEFT's LoRA layers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig as PeftLoraConfig
from peft import inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from fedra_engine.config import LoraConfig
from fedra_engine.execution.dropout import CounterDropout, DropoutKeys
from fedra_engine.models.foundation import Foundation, replace_module, share_parameters
from fedra_engine.models.heads import HeadLayout
from fedra_engine.models.state import GlobalState

_ADAPTER = "default"


@dataclass(frozen=True)
class Submodel:
    """A model with some blocks of the foundation, in ascending order; frozen weights are shared with it.

    Attributes:
        model: `model(**inputs).logits`, in eval mode (the foundation's own dropout is off).
        layers: PEFT's LoRA layers, block after block, target after target.
        head: the client's classifier.
        dropouts: the LoRA dropouts; empty without dropout.
    """

    model: nn.Module
    layers: list[LoraLayer]
    head: nn.Linear
    dropouts: list[CounterDropout]

    def parameters(self) -> list[nn.Parameter]:
        """What the client trains."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def use_dropout_keys(self, keys: DropoutKeys) -> None:
        """Draw the coming masks from `keys`."""
        for dropout in self.dropouts:
            dropout.keys = keys

    def pack(self, blocks: int, layout: HeadLayout) -> tuple[Tensor, Tensor]:
        """The trained adapters [blocks, slot size] and head [head size], laid out as in the global state."""
        factors = [f.detach().flatten() for layer in self.layers for f in _factors(layer)]
        return torch.cat(factors).view(blocks, -1), layout.pack(self.head)


def build_submodel(foundation: Foundation, lora: LoraConfig, blocks: NDArray[np.int64], state: GlobalState) -> Submodel:
    """Cut the foundation to `blocks` (ascending) and load their adapters and the head from `state`."""
    model = share_parameters(foundation.model)
    full = model.get_submodule(foundation.block_path)
    assert isinstance(full, nn.ModuleList | nn.Sequential)
    chosen = nn.ModuleList([full[block] for block in blocks.tolist()])
    held = chosen if isinstance(full, nn.ModuleList) else nn.Sequential(*chosen)
    replace_module(model, foundation.block_path, held)
    layers, dropouts = _inject(held, foundation, lora, blocks, state)
    head = _make_head(foundation, state)
    replace_module(model, foundation.head_path, head)
    return Submodel(model, layers, head, dropouts)


def _inject(
    held: nn.ModuleList | nn.Sequential,
    foundation: Foundation,
    lora: LoraConfig,
    blocks: NDArray[np.int64],
    state: GlobalState,
) -> tuple[list[LoraLayer], list[CounterDropout]]:
    layout = foundation.adapter_layout
    names = [f"{position}.{target.path}" for position in range(len(blocks)) for target in layout.targets]
    inject_adapter_in_model(
        PeftLoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=names),
        held,
    )
    layers: list[LoraLayer] = []
    dropouts: list[CounterDropout] = []
    for position, block in enumerate(blocks.tolist()):
        factors = iter(layout.named_factors(state.adapters[block]))
        for index, target in enumerate(layout.targets):
            layer = held[position].get_submodule(target.path)
            assert isinstance(layer, LoraLayer)
            for parameter in _factors(layer):
                parameter.data = next(factors)[1].clone()
            if lora.dropout > 0:
                dropouts.append(CounterDropout(block, index))
                layer.lora_dropout[_ADAPTER] = dropouts[-1]
            layers.append(layer)
    return layers, dropouts


def _factors(layer: LoraLayer) -> tuple[nn.Parameter, nn.Parameter]:
    return layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight


def _make_head(foundation: Foundation, state: GlobalState) -> nn.Linear:
    layout = foundation.head_layout
    head = nn.Linear(layout.features, layout.classes, device=state.head.device, dtype=state.head.dtype)
    layout.load(state.head, head)
    # A low-precision model hands its features to a head kept in full precision.
    head.register_forward_pre_hook(lambda module, args: (args[0].to(state.head.dtype),))
    return head
