"""Make what trains an experiment: the sweep model, the number of lanes and the executor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fedra_engine.config import ExecutionConfig, ExperimentConfig
from fedra_engine.data.samples import Samples
from fedra_engine.execution.executor import Executor
from fedra_engine.execution.memory import LaneMemory, choose_lanes
from fedra_engine.execution.sequential import SequentialExecutor
from fedra_engine.execution.sweep import SweepExecutor
from fedra_engine.execution.sweep_model import SweepModel
from fedra_engine.models.foundation import Foundation
from fedra_engine.models.sharding import Sharding
from fedra_engine.runtime.errors import InputError
from fedra_engine.runtime.processes import Processes


def make_sweep_model(
    config: ExecutionConfig, foundation: Foundation, train: Samples, device: torch.device, sharding: Sharding | None
) -> SweepModel:
    """Wrap the model for samples like those of `train`.

    Raises:
        InputError: blocks must be fused, and none of them can be.
    """
    by_default = device.type != "cpu" and sharding is None
    model = SweepModel(
        foundation,
        _examples(train, device, foundation.dtype),
        fuse_blocks=config.fused_blocks == "on" or (config.fused_blocks == "auto" and by_default),
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


def number_of_lanes(config: ExecutionConfig, memory: LaneMemory, device: torch.device, participants: int) -> int:
    """How many clients of a round of `participants` are trained at a time, if each takes `memory` of `device`.

    Raises:
        InputError: there is too little memory.
    """
    return 1 if config.executor == "sequential" else choose_lanes(config.lanes, memory, device, participants)


def make_executor(
    config: ExperimentConfig,
    foundation: Foundation,
    model: SweepModel,
    train: Samples,
    lanes: int,
    sharded_over: Processes | None,
) -> Executor:
    """The executor that the configuration names; see `SweepExecutor` for the arguments."""
    if config.execution.executor == "sequential":
        return SequentialExecutor(foundation, train, config.lora)
    return SweepExecutor(foundation, model, train, config.lora, lanes=lanes, sharded_over=sharded_over)


def _examples(samples: Samples, device: torch.device, dtype: torch.dtype) -> Callable[[int], dict[str, Tensor]]:
    # The same sample again and again will do: only shapes are looked at.
    return lambda count: samples.inputs(torch.zeros(count, dtype=torch.int64), device, dtype)
