"""How many CPU threads a step is worth: products that are small get slower when they are split."""

from __future__ import annotations

import os

import torch
from torch import nn

from fedra_engine.models.foundation import Foundation
from fedra_engine.models.linears import is_linear, linear_shape

_FLOPS_PER_THREAD = 1e8
"""A millisecond or two of a core's work; waking another thread can cost as much where others use the machine, too."""


def limit_threads(foundation: Foundation, tokens: int) -> None:
    """Let this process compute with no more CPU threads than a step of `tokens` tokens is worth.

    Only ever lowers their number, and leaves it alone where OMP_NUM_THREADS has chosen it.
    """
    if foundation.head.weight.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), worthwhile_threads(foundation.blocks[0], tokens)))


def worthwhile_threads(block: nn.Module, tokens: int) -> int:
    """Threads that the largest product of `block` with `tokens` tokens keeps busy; at least 1."""
    shapes = [linear_shape(module) for module in block.modules() if is_linear(module)]
    largest = max((inputs * outputs for inputs, outputs in shapes), default=0)
    return max(1, int(2 * tokens * largest / _FLOPS_PER_THREAD))
