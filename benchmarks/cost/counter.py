"""Count what runs on tensors of the meta device, which have sizes but no values, as a GPU would run it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.cost.rules import META, Kind, OpCall, count_call
from benchmarks.kernels.work import Peaks


@dataclass
class Count:
    """How often each call was made; equal ones are counted together."""

    calls: Counter[OpCall] = field(default_factory=Counter)

    def of(self, *ops: str, kind: Kind | None = None, ours: bool | None = None) -> Count:
        """The calls of these `ops` (none: all), of a `kind`, and of this project's kernels or of others."""
        kept = {
            call: times
            for call, times in self.calls.items()
            if (not ops or call.op in ops) and kind in (None, call.kind) and ours in (None, call.is_ours)
        }
        return Count(Counter(kept))

    @property
    def ops(self) -> list[str]:
        """The ops that were called, those that move most first."""
        return sorted({call.op for call in self.calls}, key=lambda op: (-self.of(op).bytes, op))

    @property
    def launches(self) -> int:
        """One a call; some of torch's ops launch several kernels."""
        return self.calls.total()

    @property
    def flops(self) -> float:
        """Of products."""
        return sum(call.flops * times for call, times in self.calls.items())

    @property
    def bytes(self) -> int:
        """Read and written."""
        return sum((call.read + call.written) * times for call, times in self.calls.items())

    def seconds(self, peaks: Peaks) -> float:
        """The roofline: each call takes as long as its products or its traffic, whichever is longer."""
        return sum(peaks.seconds(call.work) * times for call, times in self.calls.items())


@contextmanager
def counted_ops(rows_of_client: Sequence[int] = ()) -> Iterator[Count]:
    """Count what runs on meta tensors inside: forward passes, backward passes and optimizer steps.

    `rows_of_client` as of `count_call`.
    """
    count = Count()
    with _FlashAttention(), _CountingMode(count, rows_of_client):
        yield count


class _FlashAttention(TorchFunctionMode):
    """Has meta tensors take the op that attention is on a GPU; by itself torch would take the products apart."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and args[0].device == META:
            return _flash_attention(*args, **kwargs)
        return func(*args, **kwargs)


def _flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if attn_mask is not None or (key.shape[1] != query.shape[1] and not enable_gqa):
        raise ValueError("attention: found a mask or too few keys, expected what flash attention takes")
    output: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(
        query, key, value, dropout_p, is_causal, scale=scale
    )[0]
    return output


class _CountingMode(TorchDispatchMode):
    def __init__(self, count: Count, rows_of_client: Sequence[int]) -> None:
        super().__init__()
        self._count, self._rows_of_client = count, rows_of_client

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        leaves = tree_leaves((args, kwargs, result))
        if any(isinstance(leaf, Tensor) and leaf.device == META for leaf in leaves):
            call = count_call(func, args, kwargs, result, self._rows_of_client)
            if call is not None:
                self._count.calls[call] += 1
        return result
