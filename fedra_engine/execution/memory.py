"""How many lanes and threads a machine has room for.

The memory of a lane is measured on a pass of one and one of two samples.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import psutil
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from fedra_engine.config import LoraConfig, TrainingConfig
from fedra_engine.data.samples import Samples
from fedra_engine.execution.banks import bytes_per_parameter
from fedra_engine.execution.sweep_model import SweepModel
from fedra_engine.models.foundation import Foundation
from fedra_engine.models.structure import is_linear, linear_shape
from fedra_engine.runtime.errors import InputError

_SHARE = 0.7
"""Share of the free memory that lanes may plan with: operations need room while they run, and estimates err."""
_FLOPS_PER_THREAD = 1e8
"""Of a CPU: a millisecond or two of a core's work; waking another thread can cost as much where others use the machine,
too."""
_ENOUGH_TOKENS = {"cpu": 4096}
"""Tokens in a step from which a CPU gains nothing by more (measured: `launchers/microbench.py lanes`)."""
_ENOUGH_TOKENS_ELSEWHERE = 64 * 16 * 197
"""The same for other devices: 64 clients with 16 images of a ViT-B/16. By counted FLOPs (nothing is measured), an H100
takes as long for a step as its host takes to launch it at about a third of this."""


@dataclass(frozen=True)
class LaneMemory:
    """What a lane takes at most, whoever is in it.

    Attributes:
        parameters: bytes of the slots of all blocks and of the heads, with gradients and optimizer state.
        activations: bytes that the blocks keep of one batch for the backward pass.
        tokens: tokens of one batch.
    """

    parameters: int
    activations: int
    tokens: int

    @property
    def total(self) -> int:
        """Bytes of a lane."""
        return self.parameters + self.activations


def measure_lane(
    foundation: Foundation, model: SweepModel, samples: Samples, lora: LoraConfig, training: TrainingConfig, heads: int
) -> LaneMemory:
    """What a lane takes, if its client holds all blocks and its batch is full, of the longest sample.

    `heads` is the number of classifiers that a client may train.
    """
    longest = 0 if samples.lengths is None else int(samples.lengths.argmax())
    one, two = (_kept_bytes(foundation, model, samples, lora, longest, count) for count in (1, 2))
    inputs = samples.inputs(torch.tensor([longest]), foundation.device, foundation.dtype)
    per_parameter = bytes_per_parameter(training, foundation.adapter_dtype, foundation.dtype)
    size = foundation.depth * foundation.adapter_layout.size + heads * foundation.head_layout.size
    return LaneMemory(
        parameters=size * per_parameter,
        # What does not grow with the batch is kept once, whatever the lanes.
        activations=(two - one) * training.batch_size,
        tokens=tokens_in_blocks(foundation, inputs) * training.batch_size,
    )


def choose_lanes(asked: int | Literal["auto"], memory: LaneMemory, device: torch.device, participants: int) -> int:
    """The number of lanes: as many as asked for and as there are participants, or as are worth it and fit.

    Args:
        asked: `execution.lanes`.
        memory: what a lane takes.
        device: where they are.
        participants: of a round, at most.

    Raises:
        InputError: this process's part of the device's whole memory cannot take them, or its free part not one lane.
    """
    free, total = device_memory(device)
    lanes, available, kind = (1, free, "free ") if asked == "auto" else (min(asked, participants), total, "")
    if lanes * memory.total > available:
        raise InputError(
            f"execution.lanes: found {asked}, and {lanes} with a full batch take about "
            f"{lanes * memory.total / 2**30:.1f} GiB, expected at most the {available / 2**30:.1f} GiB of {kind}memory "
            "for a process (fewer lanes, a smaller training.batch_size, or execution.checkpoint_blocks)"
        )
    if asked != "auto":
        return lanes
    fitting = int(_SHARE * free / memory.total)
    enough = _ENOUGH_TOKENS.get(device.type, _ENOUGH_TOKENS_ELSEWHERE) // max(memory.tokens, 1)
    # Powers of two, so that a little more or less free memory seldom changes how sums are rounded.
    return 1 << (max(min(fitting, enough), 1).bit_length() - 1)


def device_memory(device: torch.device) -> tuple[int, int]:
    """Bytes that are free on `device` for this process, and bytes it could have there."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device), total
    memory = psutil.virtual_memory()
    # The processes of a job on this machine share it.
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return memory.available // processes, memory.total // processes


@torch.no_grad()
def tokens_in_blocks(foundation: Foundation, inputs: Mapping[str, Tensor]) -> int:
    """Tokens that the first block gets of a sample."""
    blocks = foundation.model.get_submodule(foundation.block_path)
    hidden: list[Tensor] = []

    def look(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden.append(next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)))

    hook = next(iter(blocks.children())).register_forward_pre_hook(look, with_kwargs=True)
    foundation.model(**inputs)
    hook.remove()
    return hidden[0].shape[1]


def _kept_bytes(
    foundation: Foundation, model: SweepModel, samples: Samples, lora: LoraConfig, row: int, count: int
) -> int:
    """Bytes that the sweep keeps of a batch of `count` times the sample `row`, of one client that holds all blocks."""
    device, dtype, slots = foundation.device, foundation.dtype, np.arange(foundation.depth)[None]
    bank = torch.zeros(foundation.depth, foundation.adapter_layout.size, dtype=dtype, device=device)
    gradients = torch.zeros_like(bank)
    inputs = samples.inputs(torch.full((count,), row), device, dtype)
    weights = [*foundation.model.parameters(), *foundation.model.buffers(), bank, gradients]
    return saved_bytes(lambda: model.features_of(inputs, bank, slots, gradients, scale=lora.scale), weights)


def saved_bytes(run: Callable[[], object], excluded: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps for the backward pass of what `run` returns, without those of `excluded` tensors."""
    sizes: list[int] = []
    record_saved(run, excluded, sizes.append)
    return sum(sizes)


def record_saved(run: Callable[[], object], excluded: Iterable[Tensor], record: Callable[[int], None]) -> None:
    """Call `record` with the bytes of each storage that autograd keeps of what `run` returns, when it first keeps it.

    The storages of `excluded` tensors do not count.
    """
    seen = {tensor.untyped_storage().data_ptr() for tensor in excluded}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            record(storage.nbytes())
        # With its history, an output that its own node keeps would hold that node, and the pass would never be freed.
        return tensor.detach()

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        # Held until all is counted: an address that is free again could be taken for one seen before.
        result = run()
    del result


class _Threads:
    """What this process had before its threads were limited, and what they were last limited to."""

    available = 0
    limit = 0


def limit_threads(foundation: Foundation, tokens: int) -> None:
    """Let this process compute with no more CPU threads than a step of `tokens` tokens is worth, or than it had.

    Where OMP_NUM_THREADS has chosen their number, they are left alone. What was limited for an earlier experiment of
    the process is available again.
    """
    if foundation.device.type != "cpu" or "OMP_NUM_THREADS" in os.environ:
        return
    if (threads := torch.get_num_threads()) != _Threads.limit:
        _Threads.available = threads
    _Threads.limit = min(_Threads.available, worthwhile_threads(foundation.blocks[0], tokens))
    torch.set_num_threads(_Threads.limit)


def worthwhile_threads(block: nn.Module, tokens: int) -> int:
    """Threads that the largest product of `block` with `tokens` tokens keeps busy; at least 1."""
    shapes = [linear_shape(module) for module in block.modules() if is_linear(module)]
    largest = max((inputs * outputs for inputs, outputs in shapes), default=0)
    return max(1, int(2 * tokens * largest / _FLOPS_PER_THREAD))
