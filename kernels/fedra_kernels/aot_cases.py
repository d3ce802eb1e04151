"""Calls that reach every kernel and every configuration, for ahead-of-time compilation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from .activation import gelu, swiglu
from .adamw import adamw
from .aggregate import aggregate
from .aot import Resources, compile_only, resources
from .counter_hash import Dropout
from .gather_norm import NormKind, gather_norm
from .groups import RowGroups
from .head import head_cross_entropy
from .lora_linear import lora_linear
from .scatter_add import scatter_add
from .sgd import sgd
from .squared_norms import squared_norms

SIZES = (300, 10)
WIDTH, OUTPUTS, CLASSES = 768, 3072, 100
BANK = 43_008
"""LoRA parameters of a ViT-B block at rank 8."""


@dataclass(frozen=True)
class Case:
    """One call of an op, forward and backward."""

    name: str
    call: Callable[[], None]


def cases() -> Iterator[Case]:
    """Every kernel with every shape class of its configuration table."""
    half, single = torch.bfloat16, torch.float32
    for dtype, rank, drop in (
        (half, 16, False), (half, 16, True), (half, 128, False), (half, 128, True),
        (single, 16, False), (single, 128, True),
    ):  # fmt: skip
        name = f"{_short(dtype)} r{rank}{' dropout' if drop else ''}"
        yield Case(f"lora_linear {name}", partial(_lora_linear, dtype, rank, drop))
    for frozen in ("A", "B"):
        yield Case(f"lora_linear bf16 r16 frozen {frozen}", partial(_lora_linear, half, 16, False, frozen))
    for dtype, rank in ((half, 16), (half, 128), (single, 128)):
        name = f"{_short(dtype)} r{rank} dropout"
        yield Case(f"gather_norm {name}", partial(_gather_norm, dtype, rank))
        yield Case(f"gelu {name}", partial(_activation, "none", dtype, rank))
    yield Case("gelu tanh bf16 r16", partial(_activation, "tanh", half, 16))
    yield Case("swiglu bf16 r16", partial(_activation, "swiglu", half, 16))
    for dtype in (half, single):
        yield Case(f"head {_short(dtype)}", partial(_head, dtype))
    yield Case("scatter_add bf16", _scatter_add)
    yield Case("optimizers fp32", partial(_optimizers, None))
    yield Case("optimizers fp32, bf16 shadow, zero_grad", partial(_optimizers, half))
    yield Case("aggregate bf16", _aggregate)


def measure(architecture: str) -> list[tuple[Case, Resources]]:
    """What each distinct kernel of the cases needs on an architecture."""
    measured, seen = [], set()
    for case in cases():
        with compile_only(architecture) as compilation:
            case.call()
        for name, compiled in compilation.kernels:
            if compiled.hash not in seen:
                seen.add(compiled.hash)
                measured.append((case, resources(architecture, name, compiled)))
    return measured


def _short(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]


def _groups() -> RowGroups:
    return RowGroups(SIZES, torch.arange(len(SIZES)), torch.ones(len(SIZES)))


def _bank(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(len(SIZES), *shape, dtype=dtype)


def _dropout() -> Dropout:
    return Dropout(0.1, torch.arange(len(SIZES)))


def _lora_linear(dtype: torch.dtype, rank: int, drop: bool, frozen: str = "") -> None:
    x = torch.zeros(sum(SIZES), WIDTH, dtype=dtype, requires_grad=True)
    a, b = _bank(rank, WIDTH, dtype=dtype), _bank(OUTPUTS, rank, dtype=dtype)
    weight, bias = torch.zeros(OUTPUTS, WIDTH, dtype=dtype), torch.zeros(OUTPUTS, dtype=dtype)
    sink_a = None if frozen == "A" else torch.zeros_like(a, dtype=torch.float32)
    sink_b = None if frozen == "B" else torch.zeros_like(b, dtype=torch.float32)
    y = lora_linear(x, weight, bias, a, b, _groups(), sink_a, sink_b, _dropout() if drop else None)
    y.backward(torch.zeros_like(y))


def _gather_norm(dtype: torch.dtype, rank: int) -> None:
    hidden = torch.zeros(400, WIDTH, dtype=dtype, requires_grad=True)
    index, ones = torch.arange(sum(SIZES)), torch.ones(WIDTH, dtype=dtype)
    cases: tuple[tuple[NormKind, Tensor | None], ...] = (("layer", ones), ("rms", None))
    for kind, bias in cases:
        x, _ = gather_norm(
            hidden, index, ones, bias, kind=kind, eps=1e-6,
            lora_a=[_bank(rank, WIDTH, dtype=dtype)] * 3, groups=_groups(), dropout=[_dropout()] * 3,
        )  # fmt: skip
        x.backward(torch.zeros_like(x))


def _activation(kind: Literal["none", "tanh", "swiglu"], dtype: torch.dtype, rank: int) -> None:
    x = torch.zeros(sum(SIZES), OUTPUTS, dtype=dtype, requires_grad=True)
    bank = _bank(rank, OUTPUTS, dtype=dtype)
    if kind == "swiglu":
        y, _ = swiglu(x, x, lora_a=bank, groups=_groups(), dropout=_dropout())
    else:
        y, _ = gelu(x, approximate=kind, lora_a=bank, groups=_groups(), dropout=_dropout())
    y.backward(torch.zeros_like(y))


def _head(dtype: torch.dtype) -> None:
    features = torch.zeros(sum(SIZES), WIDTH, dtype=dtype, requires_grad=True)
    weight, bias = _bank(CLASSES, WIDTH, dtype=dtype), _bank(CLASSES, dtype=dtype)
    sinks = torch.zeros_like(weight, dtype=torch.float32), torch.zeros_like(bias, dtype=torch.float32)
    labels = torch.zeros(sum(SIZES), dtype=torch.int64)
    losses, _ = head_cross_entropy(features, weight, bias, labels, _groups(), *sinks)
    losses.backward(torch.ones_like(losses))


def _scatter_add() -> None:
    hidden, rows = (torch.zeros(size, WIDTH, dtype=torch.bfloat16) for size in (400, 310))
    scatter_add(hidden, rows, torch.arange(310), torch.ones(WIDTH, dtype=torch.bfloat16))


def _optimizers(shadow_dtype: torch.dtype | None) -> None:
    param, grad, mean, square = (_bank(BANK) for _ in range(4))
    slots, ones, step = torch.arange(2), torch.ones(2), torch.ones(2, dtype=torch.int64)
    lower = shadow_dtype is not None
    shadow = _bank(BANK, dtype=shadow_dtype) if shadow_dtype is not None else None
    for momentum in (0.0, 0.9):
        buffer = mean if momentum else None
        sgd(
            param, grad, buffer, slots, ones, ones, step,
            momentum=momentum, weight_decay=0.1, shadow=shadow, zero_grad=lower,
        )  # fmt: skip
    adamw(
        param, grad, mean, square, slots, ones, ones, step,
        betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, shadow=shadow, zero_grad=lower,
    )  # fmt: skip
    squared_norms(grad, slots)


def _aggregate() -> None:
    numerator, denominator, slots = torch.zeros(12, BANK), torch.zeros(12), torch.arange(2)
    aggregate(numerator, denominator, _bank(BANK, dtype=torch.bfloat16), slots, slots, torch.ones(2))
