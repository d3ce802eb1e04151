"""The ops over adapter slots and heads: aggregation, optimizers, gradient norms, the classifier."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.kernels.cases import COMPILED, ENGINE, Case, Sizes, compiled, memory_case, random
from benchmarks.kernels.timing import Call
from benchmarks.kernels.work import traffic
from fedra_kernels import RowGroups, adamw, aggregate, head_cross_entropy, sgd, squared_norms

_FLOAT = 4
_LR = 1e-3


@dataclass(frozen=True)
class SlotInputs:
    """Banks [slots, slot size] in float32 and each slot's block."""

    param: Tensor
    grad: Tensor
    slots: Tensor
    blocks: Tensor
    weights: Tensor
    numerator: Tensor
    denominator: Tensor

    def per_slot(self, value: float) -> Tensor:
        """float32 [slots], all of them `value`."""
        return torch.full((len(self.param),), value, device=self.param.device)


@dataclass(frozen=True)
class HeadInputs:
    """Features [samples, in], grouped by client, and each client's classifier, in float32."""

    features: Tensor
    weight: Tensor
    bias: Tensor
    labels: Tensor
    groups: RowGroups


def slot_cases(sizes: Sizes) -> Iterator[Case]:
    """One step of each optimizer, aggregation of all slots, gradient norms, and the heads of one step."""
    banks, x = float(sizes.slots * sizes.slot_size * _FLOAT), f"{sizes.slots}×{sizes.slot_size}"
    sums = 3.0 * sizes.blocks * sizes.slot_size * sizes.sums.itemsize
    make = partial(_slots, sizes)
    for kernel, moved, providers in (
        ("aggregate", banks + sums, {ENGINE: _aggregate, "index_add_": _index_add, "one-hot matmul": _one_hot}),
        ("sgd", 5 * banks, {ENGINE: _sgd, "torch.optim.SGD(fused=True)": _fused_sgd}),
        ("adamw", 7 * banks, {ENGINE: _adamw, "torch.optim.AdamW(fused=True)": _fused_adamw}),
        ("squared_norms", banks, {ENGINE: _norms, "vector_norm": _vector_norm}),
    ):
        yield memory_case(kernel, "step", x, traffic(moved), sizes.device, make, providers)
    samples = sizes.clients * sizes.samples
    # Forward reads features and weights, backward reads both and writes their gradients.
    touched = _FLOAT * (3.0 * samples * sizes.width + 4.0 * sizes.clients * sizes.classes * sizes.width)
    heads: dict[str, Callable[[Any], Call]] = {
        ENGINE: _head,
        "torch.bmm + cross_entropy": _eager_head,
        f"{COMPILED} of torch.bmm + cross_entropy": partial(_eager_head, compile=True),
    }
    x = f"{sizes.clients}×{sizes.samples}×{sizes.classes}"
    yield memory_case(
        "head_cross_entropy", "forward + backward", x, traffic(touched), sizes.device, partial(_heads, sizes), heads
    )


def _slots(sizes: Sizes, generator: torch.Generator) -> SlotInputs:
    device, count = sizes.device, sizes.slots
    exact = sizes.sums
    shape = (count, sizes.slot_size)
    return SlotInputs(
        param=random(generator, *shape, dtype=torch.float32),
        grad=random(generator, *shape, dtype=torch.float32),
        slots=torch.arange(count, device=device),
        blocks=torch.arange(count, device=device) % sizes.blocks,
        weights=torch.ones(count, dtype=exact, device=device),
        numerator=torch.zeros(sizes.blocks, sizes.slot_size, dtype=exact, device=device),
        denominator=torch.zeros(sizes.blocks, dtype=exact, device=device),
    )


def _aggregate(i: SlotInputs) -> Call:
    return lambda: aggregate(i.numerator, i.denominator, i.param, i.slots, i.blocks, i.weights)


def _index_add(i: SlotInputs) -> Call:
    return lambda: i.numerator.index_add_(0, i.blocks, i.param * i.weights[:, None])


def _one_hot(i: SlotInputs) -> Call:
    chosen = F.one_hot(i.blocks, len(i.numerator)).T.to(i.numerator.dtype) * i.weights
    return lambda: i.numerator.addmm_(chosen, i.param.to(chosen.dtype))


def _sgd(i: SlotInputs) -> Call:
    buffer, lr, clip = torch.zeros_like(i.param), i.per_slot(_LR), i.per_slot(1.0)
    banks = (i.param, i.grad, buffer, i.slots, lr, clip, _later_step(i))
    return lambda: sgd(*banks, momentum=0.9, weight_decay=1e-5)


def _adamw(i: SlotInputs) -> Call:
    mean, square, lr, clip = torch.zeros_like(i.param), torch.zeros_like(i.param), i.per_slot(_LR), i.per_slot(1.0)
    banks = (i.param, i.grad, mean, square, i.slots, lr, clip, _later_step(i))
    return lambda: adamw(*banks, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2)


def _later_step(i: SlotInputs) -> Tensor:
    """A step at which moments are read; at the first they are not."""
    return torch.full_like(i.slots, 2)


def _fused_sgd(i: SlotInputs) -> Call:
    return torch.optim.SGD([_parameter(i)], _LR, momentum=0.9, weight_decay=1e-5, fused=True).step


def _fused_adamw(i: SlotInputs) -> Call:
    return torch.optim.AdamW([_parameter(i)], _LR, weight_decay=1e-2, fused=True).step


def _parameter(i: SlotInputs) -> nn.Parameter:
    parameter = nn.Parameter(i.param)
    parameter.grad = i.grad
    return parameter


def _norms(i: SlotInputs) -> Call:
    return lambda: squared_norms(i.grad, i.slots)


def _vector_norm(i: SlotInputs) -> Call:
    return lambda: torch.linalg.vector_norm(i.grad, dim=1)


def _heads(sizes: Sizes, generator: torch.Generator) -> HeadInputs:
    samples, device = sizes.clients * sizes.samples, sizes.device
    return HeadInputs(
        features=random(generator, samples, sizes.width, dtype=torch.float32).requires_grad_(),
        weight=random(generator, sizes.clients, sizes.classes, sizes.width, dtype=torch.float32, scale=0.02),
        bias=random(generator, sizes.clients, sizes.classes, dtype=torch.float32),
        labels=torch.randint(0, sizes.classes, (samples,), generator=generator, device=device),
        groups=RowGroups([sizes.samples] * sizes.clients, torch.arange(sizes.clients), device),
    )


def _head(i: HeadInputs) -> Call:
    sinks = torch.zeros_like(i.weight), torch.zeros_like(i.bias)

    @torch.enable_grad()
    def call() -> object:
        losses, _ = head_cross_entropy(i.features, i.weight, i.bias, i.labels, i.groups, *sinks)
        return torch.autograd.grad(losses.sum(), i.features)

    return call


def _head_losses(features: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    logits = torch.baddbmm(bias[:, None], features.unflatten(0, (len(weight), -1)), weight.transpose(1, 2))
    return F.cross_entropy(logits.flatten(0, 1), labels, reduction="sum") / (len(labels) / len(weight))


def _eager_head(i: HeadInputs, compile: bool = False) -> Call:
    losses = compiled(_head_losses) if compile else _head_losses
    weight, bias = i.weight.detach().requires_grad_(), i.bias.detach().requires_grad_()

    @torch.enable_grad()
    def call() -> object:
        return torch.autograd.grad(losses(i.features, weight, bias, i.labels), (i.features, weight, bias))

    return call
