"""A client's real sub-model: the foundation cut to the blocks it holds, with PEFT's LoRA layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
from fedra_engine.federation.assignment import Assignment
from fedra_engine.federation.work import ClientUpdate
from fedra_engine.models.foundation import Foundation, cut_to_blocks, replace_module
from fedra_engine.models.state import GlobalState

_ADAPTER = "default"


@dataclass(frozen=True)
class Submodel:
    """A model with some blocks of the foundation, in ascending order; frozen weights are shared with it.

    Attributes:
        foundation: what it is cut from.
        model: the module tree, in eval mode (the foundation's own dropout is off).
        held: its blocks.
        blocks: int64 [held], their places in the foundation.
        trained: bool [held], the blocks whose adapters are trained.
        layers: PEFT's LoRA layers of each block, target after target.
        exits: int64 [exits], which global classifiers the client has.
        depths: how many of the blocks come before each of them.
        heads: these classifiers.
        dropouts: the LoRA dropouts; empty without dropout.
    """

    foundation: Foundation
    model: nn.Module
    held: nn.ModuleList | nn.Sequential
    blocks: NDArray[np.int64]
    trained: NDArray[np.bool_]
    layers: list[list[LoraLayer]]
    exits: NDArray[np.int64]
    depths: list[int]
    heads: list[nn.Linear]
    dropouts: list[CounterDropout]

    def logits(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """[samples, classes] at each exit, one pass through the model for each."""
        return [self._logits_at(depth, head, inputs) for depth, head in zip(self.depths, self.heads, strict=True)]

    def parameters(self) -> list[nn.Parameter]:
        """What the client trains."""
        factors = [factor for layers in self.layers for layer in layers for factor in _factors(layer)]
        return [p for p in (*factors, *(p for head in self.heads for p in head.parameters())) if p.requires_grad]

    def rank_penalty(self, keep_ratio: float, weight: float) -> Callable[[], Tensor] | None:
        """The term weight · Σ ‖B[:, ⌊keep_ratio · r⌋:]‖ ‖A[⌊keep_ratio · r⌋:]‖ of the loss; None when it is zero."""
        if weight == 0:
            return None
        pairs = [_factors(layer) for layers in self.layers for layer in layers]

        def term() -> Tensor:
            first = [max(1, int(len(a) * keep_ratio)) for a, _ in pairs]
            norms = [b[:, k:].norm() * a[k:].norm() for k, (a, b) in zip(first, pairs, strict=True)]
            return weight * torch.stack(norms).sum()

        return term

    def use_dropout_keys(self, keys: DropoutKeys) -> None:
        """Draw the coming masks from `keys`."""
        for dropout in self.dropouts:
            dropout.keys = keys

    def update(self) -> ClientUpdate:
        """The trained adapters and heads, laid out as in the global state; ranks padded with zeros."""
        layout = self.foundation.adapter_layout
        trained = np.flatnonzero(self.trained)
        heads = [self.foundation.head_layout.pack(head) for head in self.heads]
        slots = heads[0].new_zeros(len(trained), layout.size)
        for slot, position in zip(slots, trained.tolist(), strict=True):
            for target, layer in enumerate(self.layers[position]):
                a, b = _factors(layer)
                layout.lora_a(slot, target)[: len(a)] = a.detach()
                layout.lora_b(slot, target)[:, : b.shape[1]] = b.detach()
        return ClientUpdate(self.blocks[trained], slots, self.exits, torch.stack(heads))

    def _logits_at(self, depth: int, head: nn.Linear, inputs: Mapping[str, Tensor]) -> Tensor:
        replace_module(self.model, self.foundation.block_path, self.held[:depth])
        replace_module(self.model, self.foundation.head_path, head)
        logits: Tensor = self.model(**inputs).logits
        return logits


def build_submodel(
    foundation: Foundation, lora: LoraConfig, assignment: Assignment, row: int, client: int, state: GlobalState
) -> Submodel:
    """Cut the foundation to what the participant in `row` of `assignment` holds, and load that from `state`."""
    blocks = np.flatnonzero(assignment.held[row])
    model = cut_to_blocks(foundation, blocks.tolist())
    held = model.get_submodule(foundation.block_path)
    assert isinstance(held, nn.ModuleList | nn.Sequential)
    rank = lora.rank if assignment.ranks is None else int(assignment.ranks[row])
    slots = state.adapters[torch.from_numpy(blocks).to(foundation.device)]
    assignment.make_own(row, client, blocks, slots, foundation.adapter_layout)
    trained = assignment.trained_blocks[row, blocks]
    layers, dropouts = _inject(held, foundation, lora, rank, blocks, slots)
    for position, of_block in enumerate(layers):
        for layer in of_block:
            for factor, name in zip(_factors(layer), ("A", "B"), strict=True):
                factor.requires_grad_(bool(trained[position]) and assignment.factors in ("both", name))
    exits = assignment.exits_of(row)
    ends = [assignment.exits[exit] for exit in exits] if assignment.exits else [blocks[-1]]
    return Submodel(
        foundation=foundation,
        model=model,
        held=held,
        blocks=blocks,
        trained=trained,
        layers=layers,
        exits=exits,
        depths=[int((blocks <= end).sum()) for end in ends],
        heads=[foundation.task.make_head(state.heads[exit]) for exit in exits.tolist()],
        dropouts=dropouts,
    )


def _inject(
    held: nn.ModuleList | nn.Sequential,
    foundation: Foundation,
    lora: LoraConfig,
    rank: int,
    blocks: NDArray[np.int64],
    slots: Tensor,
) -> tuple[list[list[LoraLayer]], list[CounterDropout]]:
    layout = foundation.adapter_layout
    names = [f"{position}.{target.path}" for position in range(len(blocks)) for target in layout.targets]
    inject_adapter_in_model(
        PeftLoraConfig(
            r=rank,
            lora_alpha=lora.scale * rank,
            lora_dropout=lora.dropout,
            target_modules=names,
            fan_in_fan_out=foundation.stores_input_first,
        ),
        held,
    )
    layers: list[list[LoraLayer]] = []
    dropouts: list[CounterDropout] = []
    for position, block in enumerate(blocks.tolist()):
        layers.append([])
        for index, target in enumerate(layout.targets):
            layer = held[position].get_submodule(target.path)
            assert isinstance(layer, LoraLayer)
            a, b = _factors(layer)
            a.data = layout.lora_a(slots[position], index)[:rank].clone()
            b.data = layout.lora_b(slots[position], index)[:, :rank].clone()
            if lora.dropout > 0:
                dropouts.append(CounterDropout(block, index))
                layer.lora_dropout[_ADAPTER] = dropouts[-1]
            layers[-1].append(layer)
    return layers, dropouts


def _factors(layer: LoraLayer) -> tuple[nn.Parameter, nn.Parameter]:
    return layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight
