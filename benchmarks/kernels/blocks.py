"""A whole block with adapters on all its Linears, against its frozen products and its attention alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cost.counter import counted_ops
from benchmarks.cost.rules import META
from benchmarks.kernels.block_shapes import BlockShape, frozen_zeros, llama_shape, vit_shape
from benchmarks.kernels.cases import ENGINE, Case, Sizes, random, rows_of_the_block
from benchmarks.kernels.lora import layer_name
from benchmarks.kernels.timing import Call
from benchmarks.kernels.work import Work
from fedra_kernels import AdaptedLayer, GradientHandOver, RowGroups, StreamBlock, stream_block
from fedra_kernels.dispatch import StandIn, launches_taken_by

KERNEL = "stream_block"
FORWARD, BOTH = "forward", "forward + backward"
_COUNTED_FOR = "sm_90"
"""The column of the configuration tables by which work is counted: the number of sums of gradients depends on it."""


@dataclass(frozen=True)
class BlockInputs:
    """A block, and a stream [2 · rows, width] of whose samples every second one holds it.

    Attributes:
        index: int64 [rows], the block's rows; tokens: of a sample.
        x: [rows, width], what the frozen products begin with.
        grad: shaped as the stream, its gradient behind the block.
        bank: [clients, slot size]; gradients: float32, the same.
    """

    shape: BlockShape
    block: StreamBlock
    stream: Tensor
    index: Tensor
    tokens: int
    x: Tensor
    grad: Tensor
    bank: Tensor
    gradients: Tensor
    groups: RowGroups


def block_cases(vit: Sizes, llama: Sizes) -> Iterator[Case]:
    """A block of a ViT and one of a LLaMA, forward, and forward with backward."""
    for family, sizes, shape in (("ViT", vit, vit_shape(vit)), ("LLaMA", llama, llama_shape(llama))):
        inputs, x = partial(_inputs, sizes, shape), f"{family}, {layer_name(sizes.width, sizes.hidden)}"
        for mode, backward in ((FORWARD, False), (BOTH, True)):
            providers = {"frozen": partial(_frozen, backward=backward), ENGINE: partial(_engine, backward=backward)}
            yield Case(KERNEL, mode, x, _work(sizes, shape, backward=backward), "frozen", inputs, providers)


def _work(sizes: Sizes, shape: BlockShape, *, backward: bool) -> Work:
    """What the engine's own code does, counted op by op; a causal attention counts half."""
    inputs = _inputs(replace(sizes, device=META), shape, None)
    rows_of_client = (sizes.samples * sizes.tokens, sizes.samples)
    with launches_taken_by(StandIn(_COUNTED_FOR)):
        call = _engine(inputs, backward=backward)
        # Once before, as the first call also makes the index tables.
        call()
        with counted_ops(rows_of_client) as count:
            call()
    return Work(tuple(each.work for each, times in count.calls.items() for _ in range(times)))


def _inputs(sizes: Sizes, shape: BlockShape, generator: torch.Generator | None) -> BlockInputs:
    """Without a generator of zeros."""
    draw = frozen_zeros(sizes.dtype, sizes.device)
    if generator is not None:
        draw = partial(random, generator, dtype=sizes.dtype)
    bank = draw(sizes.clients, shape.slot_size).mul_(sizes.hidden**-0.5)
    return BlockInputs(
        shape=shape,
        block=shape.block(draw),
        stream=draw(2 * sizes.rows, sizes.width),
        index=rows_of_the_block(sizes),
        tokens=sizes.tokens,
        x=draw(sizes.rows, sizes.width),
        grad=draw(2 * sizes.rows, sizes.width),
        bank=bank.requires_grad_(),
        gradients=torch.zeros_like(bank, dtype=torch.float32),
        groups=sizes.groups(),
    )


class _Entered(torch.autograd.Function):
    """The stream as an earlier block leaves it, without a copy; `root` is what is differentiated."""

    @staticmethod
    def forward(ctx: Any, root: Tensor, stream: Tensor) -> Tensor:
        ctx.mark_dirty(stream)
        return stream

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        return None, None


class _Owned(GradientHandOver):
    """The gradient is nobody else's, as between the blocks of a pass."""

    def take(self, grad: Tensor) -> Tensor:
        return grad


def _engine(i: BlockInputs, *, backward: bool) -> Call:
    root, attend = i.bank.new_zeros((), requires_grad=True), partial(i.shape.attend, tokens=i.tokens)

    @torch.enable_grad()
    def call() -> Tensor:
        stream = _Entered.apply(root, i.stream.detach())
        result = stream_block(stream, i.index, i.block, attend, i.bank, i.gradients, i.groups, hand_over=_Owned())
        if backward:
            torch.autograd.grad(result, root, i.grad, allow_unused=True)
        return result

    return call


def _frozen(i: BlockInputs, *, backward: bool) -> Call:
    block, attend = i.block, partial(i.shape.attend, tokens=i.tokens)

    def call() -> Tensor:
        outputs = _product(i.x, block.attention_inputs)
        leaves = [part.detach().requires_grad_() for part in block.attention_inputs.by_member([outputs])]
        with torch.enable_grad():
            attended = attend(leaves)
        x = _product(attended.detach(), block.attention_output)
        wide = _product(x, block.mlp_inputs)
        # What lies between the products is left out: any tensors of their shapes will do.
        result = _product(wide[:, : i.shape.hidden], block.mlp_output)
        if backward:
            of_y = result @ block.mlp_output.weight
            of_x = (wide if i.shape.gated else of_y) @ block.mlp_inputs.weight
            of_leaves = torch.autograd.grad(attended, leaves, of_x @ block.attention_output.weight)
            grads = zip(of_leaves, block.attention_inputs.parts(), strict=True)
            grad, (weight, _) = next(grads)
            total = grad @ weight
            for grad, (weight, _) in grads:
                total.addmm_(grad, weight)
        return result

    return call


def _product(x: Tensor, layer: AdaptedLayer) -> Tensor:
    return F.linear(x, layer.weight, layer.bias)
