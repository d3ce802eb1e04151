"""The loop an expert would write by hand: one client after another, sub-models cached, no PEFT.

A baseline that is not slow by accident: LoRA layers are built once, a client's sub-model is a new list of the
same blocks, and handing out and collecting adapters are plain copies.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from fedra_engine.data.samples import Samples
from fedra_engine.federation.assignment import Assignment
from fedra_engine.federation.updates import ClientUpdate, ClientUpdates
from fedra_engine.federation.work import LocalWork
from fedra_engine.models.foundation import Foundation, replace_module, share_parameters
from fedra_engine.models.state import GlobalState


class HandwrittenExecutor:
    """Trains one client after another by AdamW; LoRA without dropout, samples without augmentation."""

    def __init__(self, foundation: Foundation, samples: Samples) -> None:
        self._foundation = foundation
        self._samples = samples
        self._model = share_parameters(foundation.model)
        blocks = self._model.get_submodule(foundation.block_path)
        assert isinstance(blocks, nn.ModuleList)
        self._blocks = blocks
        self._adapters = [self._wrap(block) for block in blocks]
        self._head = nn.Linear(foundation.head_layout.features, foundation.head_layout.classes)
        replace_module(self._model, foundation.head_path, self._head)
        self.lanes = 1

    def train(self, work: LocalWork, assignment: Assignment, state: GlobalState) -> Iterator[ClientUpdates]:
        """Train the round as every `Executor` does. Serves FedRA's assignments: all that is held is trained."""
        layout, head_layout = self._foundation.adapter_layout, self._foundation.head_layout
        for row, client in enumerate(work.participants.tolist()):
            held = np.flatnonzero(assignment.held[row])
            replace_module(
                self._model,
                self._foundation.block_path,
                nn.ModuleList([self._blocks[b] for b in held.tolist()]),
            )
            factors = [p for block in held for layer in self._adapters[block] for p in (layer.lora_a, layer.lora_b)]
            initial = (f for block in held for _, f in layout.named_factors(state.adapters[block]))
            for parameter, value in zip(factors, initial, strict=True):
                parameter.data.copy_(value)
            head_layout.load(state.heads[0], self._head)
            loss = self._take_steps([*factors, *self._head.parameters()], work, client)
            adapters = state.adapters.new_empty(len(held), layout.size)
            trained = (f for slot in adapters for _, f in layout.named_factors(slot))
            for value, parameter in zip(trained, factors, strict=True):
                value.copy_(parameter.detach())
            exits = np.zeros(1, dtype=np.int64)
            update = ClientUpdate(held, adapters, exits, head_layout.pack(self._head)[None])
            updates = ClientUpdates.of_one(client, update, work, *loss)
            yield updates.checked(state.adapters[torch.from_numpy(held)], state.heads)

    def _take_steps(self, parameters: list[nn.Parameter], work: LocalWork, client: int) -> tuple[float, int]:
        """The local steps of a client; returns the loss, summed over their samples, and how many these are."""
        training, foundation = work.training, self._foundation
        optimizer = torch.optim.AdamW(
            parameters, work.lr, betas=training.betas, eps=training.eps, weight_decay=training.weight_decay, fused=True
        )
        total, processed = 0.0, 0
        for drawn in work.batches(client):
            batch = self._samples.batch(torch.from_numpy(drawn), foundation.device, foundation.dtype)
            loss = cross_entropy(self._model(**batch.inputs).logits, batch.labels)
            optimizer.zero_grad()
            loss.backward()
            if training.clip_norm is not None:
                nn.utils.clip_grad_norm_(parameters, training.clip_norm)
            optimizer.step()
            total += float(loss.detach()) * len(drawn)
            processed += len(drawn)
        return total, processed

    def _wrap(self, block: nn.Module) -> list[_LoraLinear]:
        layers = []
        for target in self._foundation.adapter_layout.targets:
            linear = block.get_submodule(target.path)
            assert isinstance(linear, nn.Linear)
            layers.append(_LoraLinear(linear, target.rank, target.scale))
            replace_module(block, target.path, layers[-1])
        return layers


class _LoraLinear(nn.Module):
    def __init__(self, frozen: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.frozen = frozen
        self.lora_a = nn.Parameter(torch.zeros(rank, frozen.in_features))
        self.lora_b = nn.Parameter(torch.zeros(frozen.out_features, rank))
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        adapted = linear(linear(x, self.lora_a), self.lora_b)
        return torch.add(self.frozen(x), adapted, alpha=self.scale)
