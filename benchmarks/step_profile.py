"""Where the time of a sweep goes: CPU-seconds of its parts in a round, in a model whose blocks are computed whole."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from importlib import import_module
from statistics import median
from typing import Any

from benchmarks.executors import run_round
from benchmarks.settings import Setting
from fedra_engine.data.samples import ImageSamples
from fedra_engine.execution import whole_block
from fedra_engine.execution.sweep import SweepExecutor
from fedra_engine.runtime.errors import InputError
from fedra_kernels import FrozenLinear

_OP: Any = import_module("fedra_kernels.pre_norm_block")
"""The module, whose name the package gives to the function."""
_LOW_RANK: Any = import_module("fedra_kernels._kernels.low_rank_pass")
_REST = "the rest: stem, head, hand-out, aggregation, autograd"
_PARTS: list[tuple[Any, str, str]] = [
    (FrozenLinear, "forward", "frozen products"),
    (FrozenLinear, "backward", "frozen products"),
    (_LOW_RANK, "add_low_rank", "low-rank products"),
    (_LOW_RANK, "low_rank_backward", "low-rank products"),
    (_OP, "attend", "attention"),
    (_OP, "attend_backward", "attention"),
    (_OP, "_normalize", "norms"),
    (_OP, "_normalize_backward", "norms"),
    (_OP, "_activate", "GELU"),
    (_OP, "_activate_backward", "GELU"),
    (_OP._PreNormBlock, "forward", "gathers, copies and sums in blocks"),
    (_OP._PreNormBlock, "backward", "gathers, copies and sums in blocks"),
    (SweepExecutor, "_optimize", "optimizer and clipping"),
    (ImageSamples, "batch", "batches"),
]
"""Functions by the part that their time counts for, without that of the others that they call."""


class _Clock:
    """Adds up the CPU time between calls and returns of the functions that it wraps."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._running = [_REST]
        self._since = time.process_time()

    def switch(self) -> None:
        """Count the time until now for the part that is running."""
        now = time.process_time()
        self.seconds[self._running[-1]] += now - self._since
        self._since = now

    def wrap(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        """The function, whose time counts for `part`."""

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            self.switch()
            self._running.append(part)
            try:
                return function(*args, **kwargs)
            finally:
                self.switch()
                self._running.pop()

        return call


def measure_profile(setting: Setting, repeats: int) -> list[dict[str, Any]]:
    """Medians over `repeats` rounds, after one that is not counted: CPU-seconds and shares, the largest first.

    Raises:
        InputError: the model's blocks are not computed whole.
    """
    if not any(isinstance(block, whole_block.WholeBlock) for block in setting.sweep_model.blocks):
        raise InputError(f"profile: found no block of the model of {setting.name} that one op computes")
    executor, rounds = setting.sweep(), list[dict[str, float]]()
    run_round(executor, setting)
    for _ in range(repeats):
        clock = _Clock()
        with _timed(clock):
            run_round(executor, setting)
            clock.switch()
        rounds.append(dict(clock.seconds))
    parts = {part: median([of_round[part] for of_round in rounds]) for part in rounds[0]}
    total = sum(parts.values())
    ordered = sorted(parts.items(), key=lambda entry: -entry[1])
    return [
        {"setting": f"{setting.name}: {part}", "CPU-seconds": seconds, "share": f"{seconds / total:.0%}"}
        for part, seconds in [*ordered, ("together", total)]
    ]


@contextmanager
def _timed(clock: _Clock) -> Iterator[None]:
    originals = [vars(owner)[name] for owner, name, _ in _PARTS]
    for (owner, name, part), original in zip(_PARTS, originals, strict=True):
        static = isinstance(original, staticmethod)
        timed = clock.wrap(original.__func__ if static else original, part)
        setattr(owner, name, staticmethod(timed) if static else timed)
    try:
        yield
    finally:
        for (owner, name, _), original in zip(_PARTS, originals, strict=True):
            setattr(owner, name, original)
