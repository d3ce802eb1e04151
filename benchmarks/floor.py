"""The floor of a round's time: its frozen products alone, at the sizes in which the sweep runs them."""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import nn
from torch.nn.functional import linear

from benchmarks.settings import CPU, Setting
from fedra_engine.execution.memory import hidden_shape


def rows_per_pass(setting: Setting) -> list[list[int]]:
    """Samples that go through each block in each pass of the sweep, [passes][blocks]; 0 where nobody holds it."""
    pool = setting.lane_pool()
    passes = []
    while pool.refill() or pool.in_training():
        counts = np.zeros(setting.foundation.depth, dtype=np.int64)
        for lane in pool.in_training():
            counts += len(lane.batch) * (lane.slots >= 0)
            lane.step += 1
        passes.append(counts.tolist())
        pool.take_finished()
    return passes


def frozen_products_seconds(setting: Setting) -> float:
    """CPU-seconds of every block Linear's X·Wᵀ and dY·W for the round's rows; attention and norms not counted."""
    inputs = setting.samples.inputs(torch.zeros(1, dtype=torch.int64), CPU, setting.foundation.dtype)
    tokens = hidden_shape(setting.foundation, inputs)[1]
    passes = rows_per_pass(setting)
    blocks = [
        [module for module in block.modules() if isinstance(module, nn.Linear)] for block in setting.foundation.blocks
    ]
    widest = max(max(counts) for counts in passes) * tokens
    widths = {width for linears in blocks for module in linears for width in module.weight.shape}
    buffers = {width: torch.randn(widest, width) for width in widths}
    started = time.process_time()
    with torch.no_grad():
        for counts in passes:
            for count, linears in zip(counts, blocks, strict=True):
                if count:
                    for module in linears:
                        linear(buffers[module.in_features][: count * tokens], module.weight, module.bias)
                        torch.mm(buffers[module.out_features][: count * tokens], module.weight)
    return time.process_time() - started
