"""The interface of executors, and how one is made from the configuration."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch

from fedra_engine.config import ExecutionConfig, ExperimentConfig
from fedra_engine.data.samples import Samples
from fedra_engine.execution.memory import choose_lanes, keep_freed_memory, measure_lane
from fedra_engine.execution.step_graph import CudaGraphCapture
from fedra_engine.execution.sweep import SweepExecutor
from fedra_engine.execution.sweep_model import SweepModel
from fedra_engine.execution.threads import limit_threads
from fedra_engine.federation.assignment import Assignment
from fedra_engine.federation.updates import ClientUpdates
from fedra_engine.federation.work import LocalWork
from fedra_engine.models.foundation import Foundation
from fedra_engine.models.sharding import Sharding
from fedra_engine.models.state import GlobalState
from fedra_engine.runtime.errors import InputError
from fedra_engine.runtime.processes import Processes
from fedra_engine.runtime.stages import Stage


class Executor(Protocol):
    """Trains a round's participants; all implementations give the same updates.

    Attributes:
        lanes: number of clients trained at a time; changes updates only by rounding.
    """

    lanes: int

    def train(self, work: LocalWork, assignment: Assignment, state: GlobalState) -> Iterator[ClientUpdates]:
        """Train every participant of `work`, from `state`, as its row of `assignment` says.

        Updates come in the order in which clients finish.
        """
        ...


def make_sweep_model(
    config: ExecutionConfig, foundation: Foundation, train: Samples, sharding: Sharding | None
) -> SweepModel:
    """Make the sweep model for samples like those of `train`.

    Raises:
        InputError: `execution.fused_blocks` is on, and no block can be fused.
    """
    model = SweepModel(
        foundation,
        # The first sample, repeated: only shapes matter.
        lambda count: train.inputs(torch.zeros(count, dtype=torch.int64), foundation.device, foundation.dtype),
        fuse_blocks=config.fused_blocks == "on" or (config.fused_blocks == "auto" and sharding is None),
        # The kernels of the other fused blocks save a GPU passes over its memory; on a CPU torch does what they do.
        kernel_blocks=config.fused_blocks == "on" or foundation.device.type != "cpu",
        checkpoint_blocks=config.checkpoint_blocks,
        sharding=sharding,
    )
    if config.fused_blocks == "on" and model.fused == 0:
        settings: Any = foundation.model.config
        raise InputError(
            f"execution.fused_blocks: found on with a {settings.model_type} model, none of whose blocks can be fused; "
            "expected auto or off"
        )
    return model


def make_executor(
    config: ExperimentConfig,
    foundation: Foundation,
    model: SweepModel,
    train: Samples,
    participants: int,
    heads: int,
    sharded_over: Processes | None,
) -> Executor:
    """Make the configured executor with as many lanes as fit, and set this process's number of threads.

    A round has at most `participants`, and a client at most `heads` classifiers; `sharded_over` is that of
    `SweepExecutor`.

    Raises:
        InputError: there is too little memory for the lanes.
    """
    with Stage("measuring the memory of a client"):
        memory = measure_lane(foundation, model, train, config.training, heads)
    if foundation.device.type == "cpu":
        keep_freed_memory()
    executor: Executor
    if config.execution.executor == "sequential":
        # Imports PEFT, which takes longer than importing torch.
        from fedra_engine.execution.sequential import SequentialExecutor

        executor = SequentialExecutor(foundation, train, config.lora, model.arguments)
    else:
        graphs = config.execution.cuda_graphs == "on"
        # A graph keeps the memory of its step, which others cannot use.
        of_lane = replace(memory, activations=2 * memory.activations) if graphs else memory
        lanes = choose_lanes(config.execution.lanes, of_lane, foundation.device, participants)
        capture = partial(CudaGraphCapture, foundation.device) if graphs else None
        executor = SweepExecutor(foundation, model, train, config.lora, lanes, sharded_over, capture)
    limit_threads(foundation, min(executor.lanes, participants) * memory.tokens)
    return executor
