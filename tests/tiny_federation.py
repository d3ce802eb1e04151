"""A small federation on a tiny model, trained by either executor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedra_engine.config import LoraConfig, TrainingConfig
from fedra_engine.execution.executor import Executor
from fedra_engine.execution.sequential import SequentialExecutor
from fedra_engine.execution.sweep import SweepExecutor
from fedra_engine.execution.sweep_model import SweepModel
from fedra_engine.federation.aggregation import Aggregator
from fedra_engine.federation.allocation import Allocation, uniform_allocation
from fedra_engine.federation.assignment import Assignment
from fedra_engine.federation.clients import Clients
from fedra_engine.federation.updates import ClientUpdate
from fedra_engine.federation.work import LocalWork
from fedra_engine.models.adapters import initial_adapters
from fedra_engine.models.batch_arguments import probe_batch_arguments
from fedra_engine.models.foundation import Foundation
from fedra_engine.models.stand_ins import StandIns
from fedra_engine.models.state import GlobalState, adapter_tensors, head_tensors, named_tensors
from tests.tiny import DEPTH, TARGETS, make_samples, make_tiny

# Different sizes give different step counts and ragged last batches; two clients hold equally many samples.
SAMPLE_COUNTS = [7, 3, 12, 1, 7, 9]
CAPACITIES = [4, 1, 3, 2, 2, 1]
SGD = TrainingConfig(
    optimizer="sgd",
    lr=0.1,
    momentum=0.9,
    weight_decay=1e-2,
    clip_norm=0.5,
    batch_size=4,
    local_epochs=1,
    max_local_steps=None,
)
ADAMW = replace(SGD, optimizer="adamw", lr=0.01, local_epochs=2, max_local_steps=4)

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Round:
    """The global tensors before a round, every client's update, and the global tensors after; all by name."""

    before: Tensors
    updates: dict[int, Tensors]
    after: Tensors


@dataclass
class Setting:
    """One federation on one model, trained by either executor."""

    foundation: Foundation
    lora: LoraConfig
    training: TrainingConfig
    clients: Clients
    family: str
    fuse_blocks: bool = False
    checkpoint_blocks: bool = False
    exits: int = 1
    stand_ins: bool = False
    """Whether random maps replace the blocks that clients do not hold."""
    stand_in_rank: int = 3
    assignment: Callable[[Allocation], Assignment] = Assignment
    """Makes the assignment of all clients from FedRA's allocation."""

    def executor(self, lanes: int | None) -> Executor:
        """A sweep with `lanes`, or the sequential executor."""
        samples = make_samples(self.family, sum(SAMPLE_COUNTS))
        device, dtype = torch.device("cpu"), self.foundation.dtype

        def inputs(count: int) -> Tensors:
            return samples.inputs(torch.arange(count), device, dtype)

        if lanes is None:
            arguments = probe_batch_arguments(self.foundation.model, self.foundation.blocks, inputs)
            return SequentialExecutor(self.foundation, samples, self.lora, arguments)
        model = SweepModel(
            self.foundation,
            inputs,
            fuse_blocks=self.fuse_blocks,
            checkpoint_blocks=self.checkpoint_blocks,
        )
        return SweepExecutor(self.foundation, model, samples, self.lora, lanes=lanes)

    def state(self) -> GlobalState:
        foundation = self.foundation
        adapters = initial_adapters(foundation.adapter_layout, DEPTH, seed=0, dtype=foundation.adapter_dtype)
        # With B = 0 the gradient of A vanishes; random adapters exercise every product.
        noise = torch.from_numpy(np.random.default_rng(2).normal(scale=0.1, size=tuple(adapters.shape)))
        heads = foundation.initial_heads().repeat(self.exits, 1)
        heads += torch.arange(self.exits)[:, None] * 0.01 * heads.flip(1)
        stand_ins = random_stand_ins(adapters.dtype, self.stand_in_rank) if self.stand_ins else None
        return GlobalState(adapters + noise.to(adapters.dtype), heads, stand_ins=stand_ins)

    def work(self, index: int, participants: NDArray[np.int64]) -> tuple[LocalWork, Assignment]:
        """The local work of a round and who holds what in it."""
        work = LocalWork(self.clients, participants, self.training, seed=3, round=index, lr=self.training.lr)
        allocation = uniform_allocation(self.clients.capacities, DEPTH, np.random.default_rng(index))
        assignment = self.assignment(allocation).select(participants).training_only(self.foundation.adapted)
        return work, assignment.with_stand_ins(np.arange(DEPTH)) if self.stand_ins else assignment

    def rounds(self, lanes: int | None, count: int = 1) -> list[Round]:
        """Train all clients for `count` rounds, with a sweep of `lanes` or one after another."""
        state, executor, rounds = self.state(), self.executor(lanes), []
        for index in range(count):
            aggregator = Aggregator(state)
            updates: dict[int, Tensors] = {}
            for batch in executor.train(*self.work(index, np.arange(len(self.clients))), state):
                aggregator.add(batch)
                updates |= {c: self.named(batch.of_client(i), state) for i, c in enumerate(batch.clients.tolist())}
            after = aggregator.result()
            rounds.append(Round(self.named_state(state), updates, self.named_state(after)))
            state = after
        return rounds

    def named(self, update: ClientUpdate, state: GlobalState) -> Tensors:
        """Copies of an update's tensors, by name."""
        tensors = adapter_tensors(update.blocks.tolist(), update.adapters, self.foundation.adapter_layout)
        tensors |= head_tensors(
            update.exits.tolist(), update.heads, self.foundation.head_layout, exits=len(state.heads)
        )
        return {name: tensor.clone() for name, tensor in tensors.items()}

    def named_state(self, state: GlobalState) -> Tensors:
        """Copies of all tensors of a state, by name."""
        tensors = named_tensors(state, self.foundation.adapter_layout, self.foundation.head_layout)
        return {name: tensor.clone() for name, tensor in tensors.items()}


def random_stand_ins(dtype: torch.dtype, rank: int = 3, features: int = 16) -> StandIns:
    """Maps whose outputs are about as large as what a tiny model's blocks add."""
    rng = np.random.default_rng(4)
    shapes = ((features,), (features, rank), (rank, features), (features,))
    return StandIns(*(torch.from_numpy(rng.normal(scale=0.4, size=(DEPTH, *shape))).to(dtype) for shape in shapes))


def make_setting(
    family: str,
    training: TrainingConfig,
    *,
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float64,
    fuse_blocks: bool = False,
    **lora_rules: Any,
) -> Setting:
    rules = {"target_modules": TARGETS[family]} | lora_rules
    lora = LoraConfig(rank=3, alpha=6, dropout=dropout, **rules)
    bounds = np.cumsum([0, *SAMPLE_COUNTS])
    samples = [np.arange(start, end) for start, end in pairwise(bounds)]
    clients = Clients(samples, np.zeros(len(samples), dtype=np.int64), np.array(CAPACITIES))
    return Setting(make_tiny(family, lora, dtype), lora, training, clients, family, fuse_blocks)
