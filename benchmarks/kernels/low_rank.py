"""The frozen low-rank map that stands in for a block on the rows of clients that do not hold it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.kernels.cases import ENGINE, Case, Sizes, memory_case, random, rows_of_the_block
from benchmarks.kernels.timing import Call
from benchmarks.kernels.work import Pass, Work
from fedra_kernels import low_rank_add

_RANK = 32
_SMALL = 1e-4
"""Scale of a map that can be added in place hundreds of times."""


@dataclass(frozen=True)
class LowRankInputs:
    """The arguments of `low_rank_add`: stream [2 · rows, width], of whose samples every second one lacks the block."""

    stream: Tensor
    index: Tensor
    down: Tensor
    up: Tensor
    shift: Tensor
    bias: Tensor


def low_rank_cases(sizes: Sizes) -> Iterator[Case]:
    """Forward in place; backward into a new gradient of the whole stream, as others may hold the one it is given."""
    entries = sizes.rows * sizes.width
    flops, factors = 4.0 * entries * _RANK, 2 * _RANK * sizes.width
    inputs = partial(_inputs, sizes)
    # Backward must read and write the whole stream's gradient, twice as many rows as are changed.
    for mode, moved, make in (("forward", 2 * entries, _timed_forward), ("backward", 4 * entries, _timed_backward)):
        work = Work((Pass(flops, sizes.itemsize * (moved + factors)),))
        providers = {name: partial(make, function) for name, function in _FUNCTIONS.items()}
        yield memory_case("low_rank_add", mode, f"{sizes.width} r{_RANK}", work, sizes.device, inputs, providers)


def _inputs(sizes: Sizes, generator: torch.Generator) -> LowRankInputs:
    draw = partial(random, generator, dtype=sizes.dtype)
    return LowRankInputs(
        stream=draw(2 * sizes.rows, sizes.width),
        index=rows_of_the_block(sizes),
        down=draw(sizes.width, _RANK, scale=sizes.width**-0.5),
        up=draw(_RANK, sizes.width, scale=_SMALL),
        shift=draw(_RANK),
        bias=draw(sizes.width, scale=_SMALL),
    )


def _eager(stream: Tensor, index: Tensor, down: Tensor, up: Tensor, shift: Tensor, bias: Tensor) -> Tensor:
    return stream.index_add_(0, index, torch.addmm(bias, torch.addmm(shift, stream[index], down), up))


Function = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

_FUNCTIONS: Mapping[str, Function] = {ENGINE: low_rank_add, "eager": _eager}


def _timed_forward(function: Function, i: LowRankInputs) -> Call:
    return lambda: (function(i.stream, i.index, i.down, i.up, i.shift, i.bias),)


def _timed_backward(function: Function, i: LowRankInputs) -> Call:
    leaf = i.stream.detach().requires_grad_()
    with torch.enable_grad():
        # A leaf cannot be changed in place; the backward of its copy is free.
        y = function(leaf.clone(), i.index, i.down, i.up, i.shift, i.bias)
    upstream = torch.randn_like(y)
    return lambda: torch.autograd.grad(y, leaf, upstream, retain_graph=True)
