"""A small federation on a tiny model, trained by either executor."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from fedra_engine.config import LoraConfig, TrainingConfig
from fedra_engine.execution.executor import Executor
from fedra_engine.execution.sequential import SequentialExecutor
from fedra_engine.execution.sweep import SweepExecutor
from fedra_engine.execution.sweep_model import SweepModel
from fedra_engine.execution.work import LocalWork
from fedra_engine.federation.aggregation import Aggregator
from fedra_engine.federation.allocation import uniform_allocation
from fedra_engine.federation.clients import Clients
from fedra_engine.models.adapters import initial_adapters
from fedra_engine.models.foundation import Foundation
from fedra_engine.models.state import GlobalState
from tests.tiny import DEPTH, TARGETS, make_samples, make_tiny

# Different sizes give different step counts and ragged last batches; two clients hold equally many samples.
SAMPLE_COUNTS = [7, 3, 12, 1, 7, 9]
CAPACITIES = [4, 1, 3, 2, 2, 1]
SGD = TrainingConfig(lr=0.1, batch_size=4, local_epochs=1, weight_decay=1e-2, clip_norm=0.5)
ADAMW = replace(SGD, optimizer="adamw", lr=0.01, local_epochs=2, max_local_steps=4)


@dataclass
class Setting:
    """One federation on one model, trained by either executor."""

    foundation: Foundation
    lora: LoraConfig
    training: TrainingConfig
    clients: Clients
    family: str
    fuse_blocks: bool = False

    def executor(self, lanes: int | None) -> Executor:
        """A sweep with `lanes`, or the sequential executor."""
        samples = make_samples(self.family, sum(SAMPLE_COUNTS))
        if lanes is None:
            return SequentialExecutor(self.foundation, samples, self.lora)
        device, dtype = torch.device("cpu"), self.foundation.dtype
        model = SweepModel(
            self.foundation, lambda n: samples.inputs(torch.arange(n), device, dtype), fuse_blocks=self.fuse_blocks
        )
        return SweepExecutor(self.foundation, model, samples, self.lora, lanes=lanes)

    def state(self) -> GlobalState:
        foundation = self.foundation
        adapters = initial_adapters(foundation.adapters, DEPTH, seed=0, dtype=foundation.adapter_dtype)
        # With B = 0 the gradient of A vanishes; random adapters exercise every product.
        noise = torch.from_numpy(np.random.default_rng(2).normal(scale=0.1, size=tuple(adapters.shape)))
        return GlobalState(adapters + noise.to(adapters.dtype), foundation.initial_head())

    def rounds(self, lanes: int | None, count: int) -> tuple[list[dict[int, tuple[Tensor, Tensor]]], GlobalState]:
        """Every client's update in every round, and the global state at the end."""
        state, history = self.state(), []
        executor = self.executor(lanes)
        participants = np.arange(len(self.clients))
        for index in range(count):
            work = LocalWork(self.clients, participants, self.training, seed=3, round=index, lr=self.training.lr)
            allocation = uniform_allocation(self.clients.capacities, DEPTH, np.random.default_rng(index))
            aggregator = Aggregator(state)
            updates: dict[int, tuple[Tensor, Tensor]] = {}
            for batch in executor.train(work, allocation, state):
                aggregator.add(batch)
                for position, client in enumerate(batch.clients.tolist()):
                    slots = batch.slots[torch.from_numpy(batch.slot_owners) == position]
                    updates[client] = (
                        batch.adapters[slots].clone(),
                        batch.heads[batch.head_rows[position]].clone(),
                    )
            history.append(updates)
            state = aggregator.result()
        return history, state


def make_setting(
    family: str,
    training: TrainingConfig,
    *,
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float64,
    fuse_blocks: bool = False,
) -> Setting:
    lora = LoraConfig(rank=3, alpha=6, dropout=dropout, target_modules=TARGETS[family])
    bounds = np.cumsum([0, *SAMPLE_COUNTS])
    samples = [np.arange(start, end) for start, end in pairwise(bounds)]
    clients = Clients(samples, np.zeros(len(samples), dtype=np.int64), np.array(CAPACITIES))
    return Setting(make_tiny(family, lora, dtype), lora, training, clients, family, fuse_blocks)
