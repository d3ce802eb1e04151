"""Count one training step of a model on the meta device, through the same code that trains it on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
from transformers import masking_utils

from benchmarks.cost.counter import Count, counted_ops
from benchmarks.cost.rules import META
from benchmarks.gpu.shapes import CAPACITIES, ModelShape
from benchmarks.gpu.workload import Workload
from benchmarks.kernels.work import Peaks
from fedra_engine.execution.sweep import SweepExecutor
from fedra_engine.federation.assignment import Assignment
from fedra_kernels.dispatch import StandIn, launches_taken_by

_STEPS = 2
"""The last is counted; the first also makes the index tables."""


@dataclass(frozen=True)
class ExpectedStep:
    """A counted step on a device with these peaks."""

    count: Count
    peaks: Peaks

    @property
    def seconds(self) -> float:
        """What the GPU needs at least."""
        return self.count.seconds(self.peaks)


@cache
def count_step(
    shape: ModelShape,
    *,
    lanes: int,
    samples: int,
    capacities: Sequence[int] = CAPACITIES,
    dtype: torch.dtype = torch.bfloat16,
    architecture: str = "sm_90",
) -> Count:
    """What a step of `lanes` clients with `samples`, images or texts, each asks of a GPU.

    The clients' `capacities`, in turn, are the numbers of blocks that they hold; which blocks, FedRA's allocation says.
    Adapters are on all Linears of a block, and AdamW takes the step. `architecture` is the column of the kernels'
    configuration tables, on which the number of partial sums of gradients depends.
    """
    # Decoders look whether a text consists of several.
    with (
        launches_taken_by(StandIn(architecture)),
        patch.object(masking_utils, "find_packed_sequence_indices", return_value=None),
    ):
        workload = Workload.random(replace(shape, pool=1), META, dtype)
        round = workload.round(lanes, samples=samples, steps=_STEPS, capacities=capacities)
        executor = workload.sweep_by(_CountedSweep, lanes)
        executor.rows_of_client = (samples * shape.tokens, samples)
        for _ in executor.train(round.work, Assignment(round.allocation), workload.state):
            pass
    return executor.count


class _CountedSweep(SweepExecutor):
    """A sweep that counts each of its steps, and keeps the last count."""

    rows_of_client: Sequence[int]
    count: Count

    def _step(self, *args: Any, **options: Any) -> None:
        with counted_ops(self.rows_of_client) as self.count:
            super()._step(*args, **options)
