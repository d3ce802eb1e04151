"""The sequential executor, the oracle of all tests: builds each client's sub-model with PEFT and trains it alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedra_engine.config import LoraConfig, TrainingConfig
from fedra_engine.data.samples import Samples
from fedra_engine.execution.banks import clip_factors, loss_scale
from fedra_engine.execution.dropout import CounterDropout, DropoutKeys
from fedra_engine.federation.assignment import Assignment
from fedra_engine.federation.local_terms import ClientAlone, LocalTerm, training_terms
from fedra_engine.federation.updates import ClientUpdate, ClientUpdates
from fedra_engine.federation.work import LocalWork
from fedra_engine.models.adapters import Target
from fedra_engine.models.batch_arguments import BatchArguments
from fedra_engine.models.foundation import Foundation, cut_to_blocks, replace_module
from fedra_engine.models.peft_library import LoraLayer, PeftLoraConfig, inject_adapter_in_model
from fedra_engine.models.quantization import is_quantized
from fedra_engine.models.stand_ins import StandInBlock
from fedra_engine.models.state import GlobalState
from fedra_engine.runtime.randomness import SampleDraws
from fedra_engine.runtime.stages import LOCAL_STEPS, Stage

_ADAPTER = "default"


@dataclass
class SequentialExecutor:
    """Trains one client after another, with torch's optimizers and PEFT's LoRA layers."""

    foundation: Foundation
    samples: Samples
    lora: LoraConfig = field(repr=False)
    arguments: Sequence[BatchArguments] = field(default=(), repr=False)
    """Those of the blocks, for stand-ins."""
    lanes: int = field(default=1, init=False)

    def train(self, work: LocalWork, assignment: Assignment, state: GlobalState) -> Iterator[ClientUpdates]:
        """Train the participants in the order of `work`; yields the updates of one client at a time."""
        self.foundation.use_base(state.base)
        steps = work.steps()
        with Stage(LOCAL_STEPS, int(steps.sum())) as stage:
            for row, client in enumerate(work.participants.tolist()):
                submodel = Submodel(self.foundation, self.lora, assignment, row, client, state, self.arguments)
                start = submodel.update()

                def logits(
                    inputs: Mapping[str, Tensor], step: int, client: int = client, submodel: Submodel = submodel
                ) -> list[Tensor]:
                    keys = DropoutKeys(self.lora.dropout, work.seed, work.round, [client], [step])
                    return submodel.logits(inputs, keys)

                loss = train_client(
                    logits,
                    submodel.parameters(),
                    self.samples,
                    work,
                    client,
                    self.foundation,
                    distillation=assignment.distillation,
                    factors=submodel.factors(),
                    terms=assignment.terms,
                )
                updates = ClientUpdates.of_one(client, submodel.update(), work, *loss)
                stage.advance(int(steps[row]))
                yield updates.checked(start.adapters, start.heads)


def train_client(
    logits: Callable[[Mapping[str, Tensor], int], list[Tensor]],
    parameters: Sequence[nn.Parameter],
    samples: Samples,
    work: LocalWork,
    client: int,
    foundation: Foundation,
    *,
    distillation: float = 0.0,
    factors: Sequence[tuple[Tensor, Tensor]] = (),
    terms: Sequence[LocalTerm] = (),
) -> tuple[float, int]:
    """Train a client's own model on its batches, with torch's optimizer.

    Args:
        logits: the model: takes inputs and a local step (from 0), gives logits [samples, classes] at each exit.
        parameters: the trainable parameters.
        work: batches and hyperparameters.
        foundation: the model's foundation.
        distillation: weight of the mutual distillation between exits.
        factors: A and B of each of the client's adapters, for local terms.
        terms: the method's local terms.

    Returns:
        The loss, summed over the samples of all local steps, and the number of these samples.
    """
    optimizer = _make_optimizer(parameters, work.training, work.lr)
    terms = (*terms, *training_terms(work.training))
    own = ClientAlone(parameters, [parameter.detach().clone() for parameter in parameters if terms], factors)
    device, dtype, scale = foundation.device, foundation.dtype, loss_scale(foundation.dtype)
    total, processed = 0.0, 0
    for step, drawn in enumerate(work.batches(client)):
        draws = SampleDraws(work.seed, work.round, [client], [step], [len(drawn)])
        batch = samples.batch(torch.from_numpy(drawn), device, dtype, draws)
        loss = foundation.task.loss_alone(logits(batch.inputs, step), batch.labels, distillation)
        optimizer.zero_grad(set_to_none=True)
        (torch.stack([loss, *(term.loss(own) for term in terms)]).sum() * scale).backward()
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if scale != 1:
            for gradient in gradients:
                gradient /= scale
        norms = torch.stack([torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients])
        factor = clip_factors(norms.square().sum(), work.training, parameters[0].dtype)
        for gradient in gradients:
            gradient *= factor
        optimizer.step()
        total += float(loss.detach()) * len(drawn)
        processed += len(drawn)
    return total, processed


def _make_optimizer(parameters: Sequence[nn.Parameter], training: TrainingConfig, lr: float) -> torch.optim.Optimizer:
    if training.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr, momentum=training.momentum, weight_decay=training.weight_decay)
    return torch.optim.AdamW(parameters, lr, betas=training.betas, eps=training.eps, weight_decay=training.weight_decay)


class Submodel:
    """A client's sub-model: its blocks in ascending order, with PEFT's LoRA layers.

    Frozen weights are shared with the foundation.

    Attributes:
        model: the module tree, in eval mode (the foundation's own dropout is off).
        stages: its blocks and, between them, stand-ins for others.
        held: its blocks.
        blocks: int64 [held], their indices in the foundation.
        layers: PEFT's LoRA layers, by block and target.
        heads: its classifiers, by exit.
        norms: its final norms, by exit; None where they are not trained.
    """

    def __init__(
        self,
        foundation: Foundation,
        lora: LoraConfig,
        assignment: Assignment,
        row: int,
        client: int,
        state: GlobalState,
        arguments: Sequence[BatchArguments] = (),
    ) -> None:
        """Cut the foundation to the blocks of the participant in `row`, and load its part of `state`.

        Stand-ins need the `arguments` of all blocks.
        """
        blocks = np.flatnonzero(assignment.held[row])
        self._foundation = foundation
        self.blocks = blocks
        self._places = np.flatnonzero(assignment.held[row] | assignment.replaced_blocks[row])
        self.model = cut_to_blocks(foundation, self._places.tolist())
        stages = self.model.get_submodule(foundation.block_path)
        assert isinstance(stages, nn.ModuleList | nn.Sequential)
        self.stages = stages
        self.held = nn.ModuleList(stages[position] for position in np.searchsorted(self._places, blocks).tolist())
        if assignment.replaced_blocks[row].any():
            self._put_stand_ins(state, arguments)
        rank = foundation.adapter_layout.rank if assignment.ranks is None else int(assignment.ranks[row])
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
        ends = [*assignment.exits, self._places[-1]]
        self._depths = [int((self._places <= ends[exit]).sum()) for exit in self._exits]
        self.heads = [foundation.task.make_head(state.heads[exit]) for exit in self._exits.tolist()]
        self.norms = [foundation.make_norm(state.heads[exit]) for exit in self._exits.tolist()]

    def _put_stand_ins(self, state: GlobalState, arguments: Sequence[BatchArguments]) -> None:
        """Replace the blocks that the client does not hold by stand-ins."""
        assert state.stand_ins is not None
        maps = state.stand_ins.maps(self._foundation.dtype)
        for position, block in enumerate(self._places.tolist()):
            if block not in self.blocks:
                self.stages[position] = StandInBlock(maps[block], self.stages[position], arguments[block])

    def _inject(self, lora: LoraConfig, rank: int, slots: Tensor) -> list[list[LoraLayer]]:
        """Replace the targets by PEFT's layers, with the factors of `slots` [held, slot size] up to `rank`."""
        layout, own = self._foundation.adapter_layout, self._foundation.adapter_layout.of_rank(rank)
        adapted = self._foundation.adapted[self.blocks]
        names = [f"{position}.{target.path}" for position in np.flatnonzero(adapted) for target in own.targets]
        settings = PeftLoraConfig(
            rank_pattern={_pattern(target): target.rank for target in own.targets},
            alpha_pattern={_pattern(target): target.scale * target.rank for target in own.targets},
            lora_dropout=lora.dropout,
            target_modules=names,
            fan_in_fan_out=self._foundation.stores_input_first,
        )
        if names:
            held: Any = self.held
            # By these PEFT knows where to look for layers of bitsandbytes.
            held.is_loaded_in_8bit = held.is_loaded_in_4bit = is_quantized(held)
            inject_adapter_in_model(settings, held)
        layers: list[list[LoraLayer]] = []
        for position, block in enumerate(self.blocks.tolist()):
            layers.append([])
            for index, target in enumerate(own.targets if adapted[position] else ()):
                layer = self.held[position].get_submodule(target.path)
                assert isinstance(layer, LoraLayer)
                a, b = _factors(layer)
                a.data = layout.lora_a(slots[position], index)[: target.rank].clone()
                b.data = layout.lora_b(slots[position], index)[:, : target.rank].clone()
                if lora.dropout > 0:
                    self._dropouts.append(CounterDropout(block, index))
                    layer.lora_dropout[_ADAPTER] = self._dropouts[-1]
                layers[-1].append(layer)
        return layers

    def logits(self, inputs: Mapping[str, Tensor], dropout: DropoutKeys | None = None) -> list[Tensor]:
        """Logits [samples, classes] at each exit, by one pass for each; `dropout` is needed if LoRA drops."""
        for module in self._dropouts:
            assert dropout is not None
            module.keys = dropout
        at_exits = []
        for depth, head, norm in zip(self._depths, self.heads, self.norms, strict=True):
            if norm is not None and self._foundation.norm_path is not None:
                replace_module(self.model, self._foundation.norm_path, norm)
            replace_module(self.model, self._foundation.block_path, self.stages[:depth])
            replace_module(self.model, self._foundation.head_path, head)
            at_exits.append(self.model(**inputs).logits)
        return at_exits

    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters."""
        factors = [factor for pair in self.factors() for factor in pair]
        modules = [*self.heads, *(norm for norm in self.norms if norm is not None)]
        return [p for p in (*factors, *(p for module in modules for p in module.parameters())) if p.requires_grad]

    def factors(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """A [rank, in] and B [out, rank] of each adapter, trained or not."""
        return [_factors(layer) for layers in self.layers for layer in layers]

    def update(self) -> ClientUpdate:
        """The trained adapters and heads in the layout of the global state, ranks padded with zeros."""
        layout, trained = self._foundation.adapter_layout, self._trained
        pairs = zip(self.heads, self.norms, strict=True)
        heads = [self._foundation.head_layout.pack(head, norm) for head, norm in pairs]
        slots = heads[0].new_zeros(len(trained), layout.size, dtype=self._foundation.adapter_dtype)
        for slot, position in zip(slots, trained.tolist(), strict=True):
            for target, layer in enumerate(self.layers[position]):
                a, b = _factors(layer)
                layout.lora_a(slot, target)[: len(a)] = a.detach()
                layout.lora_b(slot, target)[:, : b.shape[1]] = b.detach()
        return ClientUpdate(self.blocks[trained], slots, self._exits, torch.stack(heads))


def _pattern(target: Target) -> str:
    """The regular expression by which PEFT finds a target in any block."""
    return rf"\d+\.{re.escape(target.path)}"


def _factors(layer: LoraLayer) -> tuple[nn.Parameter, nn.Parameter]:
    return layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight
