"""The ops between a block's products: norms with gather, activations, the residual sum."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.kernels.cases import COMPILED, ENGINE, Case, Sizes, compiled, memory_case, random
from benchmarks.kernels.timing import Call
from benchmarks.kernels.work import traffic
from fedra_kernels import RowGroups, gather_norm, gelu, scatter_add, swiglu

_EPS = 1e-6
_SHRINKS = 3
"""Adapters that read a norm: query, key and value."""


@dataclass(frozen=True)
class RowInputs:
    """A block's rows and what reads them.

    Attributes:
        stream: [2 · rows, width], the residual stream, of whose samples every second one holds the block.
        index: int64 [rows], the block's rows of the stream.
        rows: [rows, features]; `other`: the same again.
        weight, bias: [width] of the norm.
        lora_a: [clients, rank, features].
    """

    stream: Tensor
    index: Tensor
    rows: Tensor
    other: Tensor
    weight: Tensor
    bias: Tensor
    lora_a: Tensor
    groups: RowGroups

    def requiring_grad(self) -> RowInputs:
        """The same with stream, rows and other as leaves of autograd."""
        stream, rows, other = (each.detach().requires_grad_() for each in (self.stream, self.rows, self.other))
        return replace(self, stream=stream, rows=rows, other=other)


Function = Callable[[RowInputs], tuple[Tensor, ...]]
"""From inputs that may require gradients to the output that is differentiated and what else the op makes."""


def row_cases(sizes: Sizes) -> Iterator[Case]:
    """Every op in the modes it has in training, gradients kept for backward where that costs traffic."""
    width, hidden = sizes.rows * sizes.width * sizes.itemsize, sizes.rows * sizes.hidden * sizes.itemsize
    shrunk = sizes.rows * sizes.rank * sizes.itemsize
    # Forward also writes the gathered rows for backward; backward fills the gradient of the whole stream.
    for kernel, features, functions, forward, backward in (
        ("gather_norm + 3 S", sizes.width, _NORM_FUNCTIONS, 3 * width + _SHRINKS * shrunk, 5 * width),
        ("gelu + S", sizes.hidden, _GELU_FUNCTIONS, 2 * hidden + shrunk, 3 * hidden),
        ("swiglu + S", sizes.hidden, _SWIGLU_FUNCTIONS, 3 * hidden + shrunk, 5 * hidden),
    ):
        yield _case(sizes, kernel, "forward", features, forward, functions)
        yield _case(sizes, kernel, "backward", features, backward, functions)
    yield _case(sizes, "scatter_add", "forward", sizes.width, 3 * width, _SCATTER_FUNCTIONS)


def _case(
    sizes: Sizes,
    kernel: str,
    mode: str,
    features: int,
    moved: int,
    functions: dict[str, Function],
) -> Case:
    make = _timed_backward if mode == "backward" else _timed_forward
    providers = {name: _Provider(make, function) for name, function in functions.items()}
    if kernel != "scatter_add":
        providers[f"{COMPILED} of eager"] = _Provider(make, functions["eager"], compile=True)

    def inputs(generator: torch.Generator) -> RowInputs:
        return _inputs(sizes, features, generator)

    return memory_case(kernel, mode, str(features), traffic(moved), sizes.device, inputs, providers)


@dataclass(frozen=True)
class _Provider:
    make: Callable[[Function, RowInputs], Call]
    function: Function
    compile: bool = False

    def __call__(self, inputs: RowInputs) -> Call:
        return self.make(compiled(self.function) if self.compile else self.function, inputs)


def _timed_forward(function: Function, inputs: RowInputs) -> Call:
    if function in _SCATTER_FUNCTIONS.values():
        return lambda: function(inputs)
    leaves = inputs.requiring_grad()
    return torch.enable_grad()(lambda: function(leaves))


def _timed_backward(function: Function, inputs: RowInputs) -> Call:
    leaves = inputs.requiring_grad()
    with torch.enable_grad():
        y = function(leaves)[0]
    upstream = torch.randn_like(y)
    wanted = [leaves.stream, leaves.rows, leaves.other]
    return lambda: torch.autograd.grad(y, wanted, upstream, retain_graph=True, allow_unused=True)


def _inputs(sizes: Sizes, features: int, generator: torch.Generator) -> RowInputs:
    dtype, device = sizes.dtype, sizes.device
    samples = torch.arange(sizes.clients * sizes.samples, device=device) * 2
    index = (samples[:, None] * sizes.tokens + torch.arange(sizes.tokens, device=device)).flatten()
    return RowInputs(
        stream=random(generator, 2 * sizes.rows, sizes.width, dtype=dtype),
        index=index,
        rows=random(generator, sizes.rows, features, dtype=dtype),
        other=random(generator, sizes.rows, features, dtype=dtype),
        weight=random(generator, sizes.width, dtype=dtype),
        bias=random(generator, sizes.width, dtype=dtype),
        lora_a=random(generator, sizes.clients, sizes.rank, features, dtype=dtype, scale=features**-0.5),
        groups=sizes.groups(),
    )


def _shrunk(i: RowInputs, y: Tensor, times: int = 1) -> tuple[Tensor, ...]:
    y3 = y.detach().unflatten(0, (i.lora_a.shape[0], -1))
    return tuple(torch.bmm(y3, i.lora_a.transpose(1, 2)) for _ in range(times))


def _norm(i: RowInputs) -> tuple[Tensor, ...]:
    banks = [i.lora_a] * _SHRINKS
    x, shrunk = gather_norm(i.stream, i.index, i.weight, i.bias, kind="layer", eps=_EPS, lora_a=banks, groups=i.groups)
    return x, *shrunk


def _eager_norm(i: RowInputs) -> tuple[Tensor, ...]:
    y = F.layer_norm(i.stream[i.index], i.weight.shape, i.weight, i.bias, _EPS)
    return y, *_shrunk(i, y, _SHRINKS)


def _gelu(i: RowInputs) -> tuple[Tensor, ...]:
    y, shrunk = gelu(i.rows, lora_a=i.lora_a, groups=i.groups)
    return (y,) if shrunk is None else (y, shrunk)


def _eager_gelu(i: RowInputs) -> tuple[Tensor, ...]:
    y = F.gelu(i.rows)
    return y, *_shrunk(i, y)


def _swiglu(i: RowInputs) -> tuple[Tensor, ...]:
    y, shrunk = swiglu(i.rows, i.other, lora_a=i.lora_a, groups=i.groups)
    return (y,) if shrunk is None else (y, shrunk)


def _eager_swiglu(i: RowInputs) -> tuple[Tensor, ...]:
    y = F.silu(i.rows) * i.other
    return y, *_shrunk(i, y)


_NORM_FUNCTIONS: dict[str, Function] = {ENGINE: _norm, "eager": _eager_norm}
_GELU_FUNCTIONS: dict[str, Function] = {ENGINE: _gelu, "eager": _eager_gelu}
_SWIGLU_FUNCTIONS: dict[str, Function] = {ENGINE: _swiglu, "eager": _eager_swiglu}
_SCATTER_FUNCTIONS: dict[str, Function] = {
    ENGINE: lambda i: (scatter_add(i.stream, i.rows, i.index),),
    "eager": lambda i: (i.stream.index_add_(0, i.index, i.rows),),
}
