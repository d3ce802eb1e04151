"""How many lanes a machine has room for.

The memory of a lane is measured on a pass of one and one of two samples.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import psutil
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from fedra_engine.config import TrainingConfig
from fedra_engine.data.samples import Samples
from fedra_engine.execution.banks import bytes_per_parameter
from fedra_engine.execution.sweep_model import SweepModel
from fedra_engine.models.foundation import Foundation
from fedra_engine.runtime.errors import InputError

_SHARE = 0.7
"""Share of the free memory for lanes; the rest is for temporary tensors and errors of the estimate."""
_ENOUGH_TOKENS = {"cpu": 8192}
"""Tokens in a step beyond which a CPU is not faster (`launchers/microbench.py lanes`). One thread of an EPYC trained a
ViT-Ti 2 % faster with 4,352 tokens than with 2,176, in bfloat16 5 %."""
_ENOUGH_TOKENS_ELSEWHERE = 64 * 16 * 197
"""The same for other devices: 64 clients with 16 images of a ViT-B/16. Not measured: by counted FLOPs, an H100 computes
for as long as its host launches kernels at about a third of this."""


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Numbers of options in glibc's malloc.h."""
_LARGEST_FROM_HEAP, _KEPT = 32 << 20, 2**31 - 1
"""Bytes: smaller requests are served from the heap, at most what glibc allows; so much of its freed memory is kept."""


@dataclass(frozen=True)
class LaneMemory:
    """Memory of a lane, for the largest client.

    Attributes:
        parameters: bytes of adapters and heads, with gradients and optimizer state.
        activations: bytes that one batch keeps for the backward pass.
        tokens: tokens of one batch.
    """

    parameters: int
    activations: int
    tokens: int

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.parameters + self.activations


def measure_lane(
    foundation: Foundation, model: SweepModel, samples: Samples, training: TrainingConfig, heads: int
) -> LaneMemory:
    """Measure the memory of a client with all blocks, `heads` classifiers, and a full batch of the longest sample."""
    longest = _longest(samples)
    one, two = (_kept_bytes(foundation, model, samples, longest, count) for count in (1, 2))
    per_parameter = bytes_per_parameter(training, foundation.adapter_dtype, foundation.dtype)
    size = foundation.depth * foundation.adapter_layout.size + heads * foundation.head_layout.size
    return LaneMemory(
        parameters=size * per_parameter,
        # The difference leaves out what does not grow with the batch, which all lanes share.
        activations=(two - one) * training.batch_size,
        tokens=tokens_of_a_sample(foundation, samples) * training.batch_size,
    )


def choose_lanes(asked: int | Literal["auto"], memory: LaneMemory, device: torch.device, participants: int) -> int:
    """Choose the number of lanes: as `execution.lanes` asks, or with `auto` as many as fit and make a step faster.

    `memory` is that of a lane, and a round has at most `participants`, which also limit the lanes that are asked for.

    Raises:
        InputError: the lanes do not fit in this process's part of the device's memory; or with `auto`, one lane does
            not fit in the part that is free.
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
    # A power of two, so that small changes of the free memory seldom change how sums are rounded.
    return 1 << (max(min(fitting, enough), 1).bit_length() - 1)


def device_memory(device: torch.device) -> tuple[int, int]:
    """Free and total bytes of this process's part of the device's memory."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device), total
    memory = psutil.virtual_memory()
    # The processes of a job on this machine share it.
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return memory.available // processes, memory.total // processes


@torch.no_grad()
def hidden_shape(foundation: Foundation, inputs: Mapping[str, Tensor]) -> torch.Size:
    """Shape of the hidden states in the first block, (samples, tokens, features)."""
    blocks = foundation.model.get_submodule(foundation.block_path)
    hidden: list[Tensor] = []

    def look(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden.append(next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)))

    hook = next(iter(blocks.children())).register_forward_pre_hook(look, with_kwargs=True)
    foundation.model(**inputs)
    hook.remove()
    return hidden[0].shape


def _kept_bytes(foundation: Foundation, model: SweepModel, samples: Samples, row: int, count: int) -> int:
    """Bytes that a pass saves for backward, of one client with all blocks and `count` times the sample `row`."""
    device, dtype, slots = foundation.device, foundation.dtype, np.arange(foundation.depth)[None]
    bank = torch.zeros(foundation.depth, foundation.adapter_layout.size, dtype=dtype, device=device)
    gradients = torch.zeros_like(bank)
    inputs = samples.inputs(torch.full((count,), row), device, dtype)
    weights = [*foundation.model.parameters(), *foundation.model.buffers(), bank, gradients]
    return saved_bytes(lambda: model.features_of(inputs, bank, slots, gradients), weights)


def saved_bytes(run: Callable[[], object], excluded: Iterable[Tensor]) -> int:
    """Bytes that autograd saves during `run` for the backward pass, without those of the `excluded` tensors."""
    sizes: list[int] = []
    record_saved(run, excluded, sizes.append)
    return sum(sizes)


def record_saved(run: Callable[[], object], excluded: Iterable[Tensor], record: Callable[[int], None]) -> None:
    """Call `record` with the bytes of each storage that autograd saves during `run`, once for each.

    The storages of `excluded` tensors do not count.
    """
    seen = {tensor.untyped_storage().data_ptr() for tensor in excluded}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            record(storage.nbytes())
        # With its history, an output saved by its own node would be a reference cycle, and never be freed.
        return tensor.detach()

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        # Kept until all is counted, or an address could be used again and not be counted.
        result = run()
    del result


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees, for the next step, if its C library is glibc.

    Given back and taken again, the activations of a step cost a page fault for every 4 KiB: 5 to 10 % of the time of a
    ViT-Ti in steps of 2,176 tokens.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_THRESHOLD, _LARGEST_FROM_HEAP)
    mallopt(_M_TRIM_THRESHOLD, _KEPT)


def tokens_of_a_sample(foundation: Foundation, samples: Samples) -> int:
    """Tokens of the longest of the `samples`."""
    inputs = samples.inputs(torch.tensor([_longest(samples)]), foundation.device, foundation.dtype)
    return hidden_shape(foundation, inputs)[1]


def _longest(samples: Samples) -> int:
    return 0 if samples.lengths is None else int(samples.lengths.argmax())
