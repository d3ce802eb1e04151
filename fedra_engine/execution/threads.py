"""How many CPU threads a step is worth: products that are small get slower when they are split."""

from __future__ import annotations

import os

import torch
from torch import nn

from fedra_engine.models.foundation import Foundation
from fedra_engine.models.linears import is_linear, linear_shape

_FLOPS_PER_THREAD = 1e8
"""A millisecond or two of a core's work; waking another thread can cost as much where others use the machine, too."""


class _Threads:
    """The threads that this process had before they were limited, and what they were last limited to."""

    available = 0
    limit = 0


def limit_threads(foundation: Foundation, tokens: int) -> None:
    """Let this process compute with no more CPU threads than a step of `tokens` tokens is worth.

    Never uses more than it had before, and leaves them alone where OMP_NUM_THREADS has chosen their number. What was
    limited for an earlier experiment of the process is available again.
    """
    if foundation.head.weight.device.type != "cpu" or "OMP_NUM_THREADS" in os.environ:
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
