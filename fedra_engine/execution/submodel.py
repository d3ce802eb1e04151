"""A client's real sub-model: the foundation cut to the blocks it holds, with PEFT's LoRA layers."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
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


class Submodel:
    """A model with some blocks of the foundation, in ascending order; frozen weights are shared with it.

    Attributes:
        model: the module tree, in eval mode (the foundation's own dropout is off).
        held: its blocks.
        blocks: int64 [held], their places in the foundation.
        layers: PEFT's LoRA layers of each block, target after target.
        heads: the global classifiers that the client has.
    """

    def __init__(
        self,
        foundation: Foundation,
        lora: LoraConfig,
        assignment: Assignment,
        row: int,
        client: int,
        state: GlobalState,
    ) -> None:
        """Cut the foundation to what the participant in `row` of `assignment` holds, and load that from `state`."""
        blocks = np.flatnonzero(assignment.held[row])
        self._foundation = foundation
        self.blocks = blocks
        self.model = cut_to_blocks(foundation, blocks.tolist())
        held = self.model.get_submodule(foundation.block_path)
        assert isinstance(held, nn.ModuleList | nn.Sequential)
        self.held = held
        rank = lora.rank if assignment.ranks is None else int(assignment.ranks[row])
        slots = state.adapters[torch.from_numpy(blocks).to(foundation.device)]
        assignment.make_own(row, client, blocks, slots, foundation.adapter_layout)
        self._dropouts: list[CounterDropout] = []
        self.layers = self._inject(lora, rank, slots)
        self._trained = np.flatnonzero(assignment.trained_blocks[row, blocks])
        for position, layers in enumerate(self.layers):
            for layer in layers:
                for factor, name in zip(_factors(layer), ("A", "B"), strict=True):
                    factor.requires_grad_(position in self._trained and assignment.factors in ("both", name))
        self._exits = assignment.exits_of(row)
        ends = [assignment.exits[exit] for exit in self._exits] if assignment.exits else [blocks[-1]]
        self._depths = [int((blocks <= end).sum()) for end in ends]
        self.heads = [foundation.task.make_head(state.heads[exit]) for exit in self._exits.tolist()]

    def _inject(self, lora: LoraConfig, rank: int, slots: Tensor) -> list[list[LoraLayer]]:
        """PEFT's layers in place of the targets, with the factors of `slots` [held, slot size] up to `rank`."""
        layout = self._foundation.adapter_layout
        names = [f"{position}.{target.path}" for position in range(len(slots)) for target in layout.targets]
        inject_adapter_in_model(
            PeftLoraConfig(
                r=rank,
                lora_alpha=lora.scale * rank,
                lora_dropout=lora.dropout,
                target_modules=names,
                fan_in_fan_out=self._foundation.stores_input_first,
            ),
            self.held,
        )
        layers: list[list[LoraLayer]] = []
        for position, block in enumerate(self.blocks.tolist()):
            layers.append([])
            for index, target in enumerate(layout.targets):
                layer = self.held[position].get_submodule(target.path)
                assert isinstance(layer, LoraLayer)
                a, b = _factors(layer)
                a.data = layout.lora_a(slots[position], index)[:rank].clone()
                b.data = layout.lora_b(slots[position], index)[:, :rank].clone()
                if lora.dropout > 0:
                    self._dropouts.append(CounterDropout(block, index))
                    layer.lora_dropout[_ADAPTER] = self._dropouts[-1]
                layers[-1].append(layer)
        return layers

    def logits(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """[samples, classes] at each exit, one pass through the model for each."""
        return [self._logits_at(depth, head, inputs) for depth, head in zip(self._depths, self.heads, strict=True)]

    def parameters(self) -> list[nn.Parameter]:
        """What the client trains."""
        factors = [factor for pair in self.factors() for factor in pair]
        return [p for p in (*factors, *(p for head in self.heads for p in head.parameters())) if p.requires_grad]

    def factors(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """A [rank, in] and B [out, rank] of each adapter, trained or not."""
        return [_factors(layer) for layers in self.layers for layer in layers]

    def use_dropout_keys(self, keys: DropoutKeys) -> None:
        """Draw the coming masks from `keys`."""
        for dropout in self._dropouts:
            dropout.keys = keys

    def update(self) -> ClientUpdate:
        """The trained adapters and heads, laid out as in the global state; ranks padded with zeros."""
        layout, trained = self._foundation.adapter_layout, self._trained
        heads = [self._foundation.head_layout.pack(head) for head in self.heads]
        slots = heads[0].new_zeros(len(trained), layout.size)
        for slot, position in zip(slots, trained.tolist(), strict=True):
            for target, layer in enumerate(self.layers[position]):
                a, b = _factors(layer)
                layout.lora_a(slot, target)[: len(a)] = a.detach()
                layout.lora_b(slot, target)[:, : b.shape[1]] = b.detach()
        return ClientUpdate(self.blocks[trained], slots, self._exits, torch.stack(heads))

    def _logits_at(self, depth: int, head: nn.Linear, inputs: Mapping[str, Tensor]) -> Tensor:
        replace_module(self.model, self._foundation.block_path, self.held[:depth])
        replace_module(self.model, self._foundation.head_path, head)
        logits: Tensor = self.model(**inputs).logits
        return logits


def _factors(layer: LoraLayer) -> tuple[nn.Parameter, nn.Parameter]:
    return layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight
