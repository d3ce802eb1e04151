"""How many CPU threads a step or an evaluation keeps busy."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from fedra_engine.data.samples import Samples
from fedra_engine.execution.memory import tokens_of_a_sample
from fedra_engine.models.foundation import Foundation
from fedra_engine.models.structure import is_linear, linear_shape

_FLOPS_PER_THREAD = 1e8
"""One or two milliseconds of a CPU core; on a machine with other work, waking a thread can take as long."""


class _Threads:
    """This process's threads before any limit, and the last limit."""

    available = 0
    limit = 0


def limit_threads(foundation: Foundation, tokens: int) -> None:
    """Limit this process's CPU threads to what a step of `tokens` tokens keeps busy.

    Does nothing where OMP_NUM_THREADS is set. A limit for an earlier experiment of the process no longer counts.
    """
    if not _may_limit(foundation):
        return
    if (threads := torch.get_num_threads()) != _Threads.limit:
        _Threads.available = threads
    _Threads.limit = min(_Threads.available, worthwhile_threads(foundation.blocks[0], tokens))
    torch.set_num_threads(_Threads.limit)


@contextmanager
def threads_for(foundation: Foundation, samples: Samples, batch: int) -> Iterator[None]:
    """Inside, use the CPU threads that a pass of `batch` samples keeps busy, which may be more than those of a step.

    All processes that share a sharded model must enter it together.
    """
    if not _may_limit(foundation):
        yield
        return
    before = torch.get_num_threads()
    limit_threads(foundation, min(batch, len(samples.domains)) * tokens_of_a_sample(foundation, samples))
    try:
        yield
    finally:
        _Threads.limit = before
        torch.set_num_threads(before)


def _may_limit(foundation: Foundation) -> bool:
    return foundation.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ


def worthwhile_threads(block: nn.Module, tokens: int) -> int:
    """Number of threads that the largest product of `block` with `tokens` tokens keeps busy; at least 1."""
    shapes = [linear_shape(module) for module in block.modules() if is_linear(module)]
    largest = max((inputs * outputs for inputs, outputs in shapes), default=0)
    return max(1, int(2 * tokens * largest / _FLOPS_PER_THREAD))
