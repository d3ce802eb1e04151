"""What one training step costs the host and the GPU, and what it launches."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Callable, Set
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.workload import Workload, synchronize
from benchmarks.launches import counted_launches
from fedra_engine.execution.sweep import SweepExecutor
from fedra_kernels.dispatch import launches_observed_by

_TIMED, _SYNCHRONIZATIONS, _COUNTED = (1, 2, 3), 4, 5
"""Steps of a round, from 0, and what is looked at in them; the first one builds the tables."""
STEPS = _COUNTED + 1
LONGEST = 10


@dataclass
class StepCost:
    """One step that builds no table.

    Attributes:
        host: seconds until the host has queued it.
        gpu: seconds on the GPU from its first to its last kernel; 0 on a CPU.
        triton, others: kernels of this project and other kernels that are launched, by name; on a CPU, `others` are
            torch's ops that compute something there, in place of this project's kernels, too.
        copies: copies and fills, by name.
        synchronizations: calls at which the host waited for the GPU, by the line that made them; none on a CPU.
        longest: kernels with the most time on the GPU: name, launches, seconds.
        ops: seconds on the GPU of the kernels that each op launched; empty on a CPU.
    """

    host: float = 0.0
    gpu: float = 0.0
    triton: Counter[str] = field(default_factory=Counter)
    others: Counter[str] = field(default_factory=Counter)
    copies: Counter[str] = field(default_factory=Counter)
    synchronizations: Counter[str] = field(default_factory=Counter)
    longest: list[tuple[str, int, float]] = field(default_factory=list)
    ops: dict[str, float] = field(default_factory=dict)


def step_cost(workload: Workload, *, lanes: int, samples: int) -> StepCost:
    """Train one round of as many clients as lanes, whose steps are looked at one by one."""
    cost = StepCost()
    hosts: list[float] = []
    gpus: list[float] = []
    executor = workload.sweep_by(_WatchedSweep, lanes)
    number = 0

    def watch(step: Callable[[], None]) -> None:
        nonlocal number
        synchronize(workload.device)
        if number in _TIMED:
            host, gpu = _time(step, workload.device)
            hosts.append(host)
            gpus.append(gpu)
        elif number == _SYNCHRONIZATIONS and workload.device.type == "cuda":
            cost.synchronizations = _synchronizations(step)
        elif number == _COUNTED:
            (_profile if workload.device.type == "cuda" else _count)(step, cost)
        else:
            step()
        number += 1

    executor.watch = watch
    workload.train(executor, workload.round(lanes, samples=samples, steps=STEPS))
    cost.host, cost.gpu = float(np.median(hosts)), float(np.median(gpus))
    return cost


class _WatchedSweep(SweepExecutor):
    """A sweep of whose steps each is given to `watch`, which runs it."""

    watch: Callable[[Callable[[], None]], None]

    def _step(self, *args: Any, **options: Any) -> None:
        step = super()._step
        self.watch(lambda: step(*args, **options))


def _time(step: Callable[[], None], device: torch.device) -> tuple[float, float]:
    if device.type != "cuda":
        started = time.perf_counter()
        step()
        return time.perf_counter() - started, 0.0
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    started = time.perf_counter()
    step()
    host = time.perf_counter() - started
    end.record()
    end.synchronize()
    return host, start.elapsed_time(end) / 1000


def _synchronizations(step: Callable[[], None]) -> Counter[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        previous = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode(previous)
    places = (warning for warning in caught if "synchronizing CUDA operation" in str(warning.message))
    return Counter(f"{warning.filename.rpartition('site-packages/')[2]}:{warning.lineno}" for warning in places)


def _count(step: Callable[[], None], cost: StepCost) -> None:
    with counted_launches() as counts:
        step()
    cost.triton, cost.others = counts.triton, counts.torch


def _profile(step: Callable[[], None], cost: StepCost) -> None:
    own: set[str] = set()
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with launches_observed_by(own.add), profile(activities=activities) as profiler:
        step()
        torch.cuda.synchronize()
    seconds: Counter[str] = Counter()
    for event in profiler.events() or ():
        if event.device_type != DeviceType.CUDA or event.is_user_annotation:
            continue
        counts = kind_of(event.name, cost, own)
        counts[event.name] += 1
        seconds[event.name] += event.time_range.elapsed_us() / 1e6
    launches = cost.triton + cost.others + cost.copies
    cost.longest = [(name, launches[name], spent) for name, spent in seconds.most_common(LONGEST)]
    cost.ops = {op.key: op.device_time_total / 1e6 for op in profiler.key_averages() if "::" in op.key}


def kind_of(name: str, cost: StepCost, own: Set[str]) -> Counter[str]:
    """Where a profiled event of this name is counted; `own` are the kernels of this project that were launched."""
    if name.startswith(("Memcpy", "Memset")):
        return cost.copies
    return cost.triton if name in own else cost.others
