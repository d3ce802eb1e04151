"""What a stretch of code asks of a GPU, counted on any machine: launches, and points at which the host waits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedra_kernels.dispatch import launches_observed_by

_BLOCKING = {
    "_local_scalar_dense": "item",
    "nonzero": "nonzero",
    "masked_select": "masked_select",
    "bincount": "bincount",
    "unique_dim": "unique",
    "_unique2": "unique",
    "equal": "equal",
}
"""Ops whose result the host waits for."""
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
"""Ops that look up the positions of a mask, for which the host waits, where an index is bool."""
_COPIES = {"_to_copy", "copy_"}


@dataclass
class LaunchCounts:
    """Counted by name.

    Attributes:
        triton: launches of this project's kernels.
        torch: other ops that launch a kernel, or a copy, on a GPU: those that make or change values.
        blocking: ops for which the host waits: `item`, `nonzero`, masks as indices, copies between devices that do
            not go through page-locked memory.
        copies: copies between devices.
    """

    triton: Counter[str] = field(default_factory=Counter)
    torch: Counter[str] = field(default_factory=Counter)
    blocking: Counter[str] = field(default_factory=Counter)
    copies: Counter[str] = field(default_factory=Counter)


@contextmanager
def counted_launches() -> Iterator[LaunchCounts]:
    """Count what is launched inside, in this thread: forward passes, optimizer steps, and backward passes on a CPU."""
    counts = LaunchCounts()

    def observe(kernel: str) -> None:
        counts.triton[kernel] += 1

    with launches_observed_by(observe), _CountingMode(counts):
        yield counts


class _CountingMode(TorchDispatchMode):
    def __init__(self, counts: LaunchCounts) -> None:
        super().__init__()
        self._counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.namespace == "aten":
            self._count(func, args, kwargs, result)
        return result

    def _count(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        name = func._schema.name.removeprefix("aten::")
        blocking = _BLOCKING.get(name)
        if name in _INDEXING and any(_is_mask(index) for index in args[1]):
            blocking = "mask as index"
        if name in _COPIES and _crosses(args, result):
            self._counts.copies[name] += 1
            if not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])):
                blocking = f"blocking {name}"
        if blocking is not None:
            self._counts.blocking[blocking] += 1
        if computes(func, name, result):
            self._counts.torch[name] += 1


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


def _crosses(args: Any, result: Any) -> bool:
    devices = {leaf.device for leaf in tree_leaves((args[:2], result)) if isinstance(leaf, Tensor)}
    return len(devices) > 1


def computes(func: Any, name: str, result: Any) -> bool:
    """Whether an op makes or changes values: not a view, an allocation or an empty tensor."""
    if name.startswith(("empty", "new_empty", "_reshape_alias", "_unsafe_view", "detach", "lift_fresh")):
        return False
    values = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    if values and not any(value.numel() for value in values):
        return False
    returns = func._schema.returns
    is_view = bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    return bool(values or func._schema.is_mutable) and not is_view
