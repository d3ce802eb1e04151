"""What a kernel benchmark is: an op at some sizes, its counted work, and everyone who can do that work."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar, cast

import torch
import torch._functorch.config as functorch_config
from torch import Tensor

from benchmarks.kernels.timing import Call
from benchmarks.kernels.work import Work
from fedra_kernels import RowGroups

Compilable = TypeVar("Compilable", bound=Callable[..., Any])

ENGINE = "fedra"
COMPILED = "torch.compile"
"""The start of the names of providers that take seconds to compile; they are measured last, and on a GPU only."""


@dataclass(frozen=True)
class Sizes:
    """The batch of one block: `clients` × `samples` × `tokens` rows, and the banks behind it.

    Attributes:
        width, hidden: features of the residual stream, and inside the MLP.
        layers: (inputs, outputs) of the block's Linears.
        slots: rows of the adapter bank in the ops over slots.
        blocks: blocks of the global model.
        sums: of the aggregator; the engine keeps float64 on a CPU.
    """

    clients: int
    samples: int
    tokens: int
    width: int
    hidden: int
    rank: int
    slots: int
    blocks: int
    classes: int
    dtype: torch.dtype
    device: torch.device
    sums: torch.dtype = torch.float32

    @property
    def rows(self) -> int:
        """Tokens of all clients."""
        return self.clients * self.samples * self.tokens

    @property
    def layers(self) -> tuple[tuple[int, int], ...]:
        """(inputs, outputs) of the Linears of a block: q, k and v as one, o, fc1, fc2."""
        width, hidden = self.width, self.hidden
        return (width, 3 * width), (width, width), (width, hidden), (hidden, width)

    @property
    def slot_size(self) -> int:
        """LoRA parameters of a block with an adapter on each of `layers`."""
        return self.rank * sum(inputs + outputs for inputs, outputs in self.layers)

    @property
    def itemsize(self) -> int:
        """Bytes of a value of `dtype`."""
        return self.dtype.itemsize

    def groups(self, rows: int | None = None) -> RowGroups:
        """`rows` for every client (by default its tokens); client k's slot is k and its scale 1."""
        sizes = [self.samples * self.tokens if rows is None else rows] * self.clients
        return RowGroups(sizes, torch.arange(self.clients), self.device)


def vit_base(device: torch.device) -> Sizes:
    """64 clients × 16 images × 197 tokens in a block of ViT-B/16, bf16, rank 16."""
    return Sizes(64, 16, 197, 768, 3072, 16, 64 * 7, 12, 100, torch.bfloat16, device)


def llama_7b(device: torch.device) -> Sizes:
    """16 clients × 2,048 tokens in a block of a LLaMA of 7 billion parameters, bf16, rank 16."""
    return Sizes(16, 1, 2048, 4096, 14336, 16, 16, 32, 100, torch.bfloat16, device)


def cpu_sizes() -> Sizes:
    """What one CPU thread does in milliseconds, in float32."""
    return Sizes(8, 4, 17, 192, 768, 8, 64, 12, 10, torch.float32, torch.device("cpu"), torch.float64)


@dataclass(frozen=True)
class Case:
    """One op in one mode at one size.

    Attributes:
        kernel, mode, x: what is measured; `x` describes the size.
        work: counted FLOPs and bytes.
        denominator: the provider whose time the others are a multiple of.
        inputs: makes a set of random inputs from a generator.
        providers: from a set of inputs to the call that is timed.
    """

    kernel: str
    mode: str
    x: str
    work: Work
    denominator: Literal["frozen", "copy"]
    inputs: Callable[[torch.Generator], Any]
    providers: Mapping[str, Callable[[Any], Call]]


def memory_case(
    kernel: str,
    mode: str,
    x: str,
    work: Work,
    device: torch.device,
    inputs: Callable[[torch.Generator], Any],
    providers: Mapping[str, Callable[[Any], Call]],
) -> Case:
    """A case bound by memory, beside a device copy that moves as many bytes."""
    copy = partial(_copy, int(work.bytes), device)
    return Case(kernel, mode, x, work, "copy", inputs, {"copy": copy, **providers})


def _copy(count: int, device: torch.device, _: Any) -> Call:
    source = torch.randint(0, 256, (count // 2,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def rows_of_the_block(sizes: Sizes) -> Tensor:
    """int64 [rows]: of a stream of twice as many rows those of every second sample, in which the block is held."""
    samples = torch.arange(sizes.clients * sizes.samples, device=sizes.device) * 2
    return (samples[:, None] * sizes.tokens + torch.arange(sizes.tokens, device=sizes.device)).flatten()


def compiled(function: Compilable) -> Compilable:
    """`function` compiled for the shapes it is called with."""
    # A backward is timed many times on one graph, which must keep its buffers for that.
    functorch_config.donated_buffer = False
    return cast(Compilable, torch.compile(function, dynamic=False))


def random(generator: torch.Generator, *shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Normal values on the generator's device."""
    values = torch.randn(*shape, generator=generator, device=generator.device, dtype=dtype)
    return values.mul_(scale)
