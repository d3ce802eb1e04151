"""Percentile timings: GPU time between events, or CPU time of this process."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import numpy as np
import torch

Call = Callable[[], object]

_MIN_REPEATS, _MAX_REPEATS = 5, 500


@dataclass(frozen=True)
class Times:
    """Seconds of one call: the 20th, 50th and 80th percentile."""

    p20: float
    p50: float
    p80: float


def time_calls(calls: Sequence[Call], device: torch.device, *, seconds: float) -> Times:
    """Time `calls` in turn for about `seconds`, after a warm-up of each.

    The calls do the same work on different tensors, so that none finds its inputs in a cache (see `copies`).
    On a GPU these are seconds between events, as `triton.testing.do_bench` takes them; on a CPU, CPU-seconds.
    """
    samples = _gpu_samples(calls, device, seconds) if device.type == "cuda" else _cpu_samples(calls, seconds)
    return Times(*(float(value) for value in np.quantile(samples, (0.2, 0.5, 0.8))))


def copies(input_bytes: int, device: torch.device) -> int:
    """How many sets of inputs to rotate through: together twice as large as the L2 cache; 1 on a CPU."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return int(min(max(-(-2 * cache // max(input_bytes, 1)), 1), 16))


def _gpu_samples(calls: Sequence[Call], device: torch.device, seconds: float) -> list[float]:
    # Writing this evicts what is left in the L2, and keeps the GPU busy while the host queues the call.
    flush = torch.empty(1 << 28, dtype=torch.int8, device=device)
    for call in calls:
        call()
    torch.cuda.synchronize(device)
    started = time.perf_counter()
    for call in islice(cycle(calls), 3):
        call()
    torch.cuda.synchronize(device)
    count = _repeats(seconds, (time.perf_counter() - started) / 3)
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for call, (start, end) in zip(cycle(calls), pairs, strict=False):
        flush.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) / 1000 for start, end in pairs]


def _cpu_samples(calls: Sequence[Call], seconds: float) -> list[float]:
    for call in calls:
        call()
    started = time.process_time()
    calls[0]()
    count = _repeats(seconds, time.process_time() - started)
    samples = []
    for call in islice(cycle(calls), count):
        started = time.process_time()
        call()
        samples.append(time.process_time() - started)
    return samples


def _repeats(seconds: float, estimate: float) -> int:
    return int(min(max(seconds / max(estimate, 1e-6), _MIN_REPEATS), _MAX_REPEATS))
