"""Calls that reach every kernel and every configuration, for ahead-of-time compilation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.aot import Resources, compile_only, resources
from benchmarks.kernels.block_shapes import BlockShape, frozen_zeros
from fedra_kernels import (
    Dropout,
    RowGroups,
    adamw,
    aggregate,
    head_cross_entropy,
    lora_linear,
    low_rank_add,
    sgd,
    squared_norms,
    stream_block,
)
from fedra_kernels._kernels.configs import NARROW_RANK
from fedra_kernels._kernels.lora_gemm import gemm_tile, lora_gemm, lora_gemm_onto
from fedra_kernels._kernels.lora_single_pass import lora_single_pass, lora_single_pass_onto, single_pass_tile
from fedra_kernels._kernels.stream_steps import Activation


@dataclass(frozen=True)
class Shapes:
    """Sizes of the calls' tensors: a ViT-B's, with few rows.

    sizes: rows of each group, which has a slot of its own. width, outputs: features in and out of a layer.
    slot: parameters of a bank's slot; the default is a block's LoRA parameters at rank 8.
    """

    sizes: tuple[int, ...] = (300, 10)
    width: int = 768
    outputs: int = 3072
    classes: int = 100
    slot: int = 43_008

    @property
    def rows(self) -> int:
        """Rows of all groups together."""
        return sum(self.sizes)

    def groups(self) -> RowGroups:
        """The row groups, each with the slot of its number."""
        return RowGroups(self.sizes, torch.arange(len(self.sizes)))

    def bank(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Zeros of every slot."""
        return torch.zeros(len(self.sizes), *shape, dtype=dtype)

    def dropout(self) -> Dropout:
        """LoRA dropout with a key for every group."""
        return Dropout(0.1, torch.arange(len(self.sizes)))


@dataclass(frozen=True)
class Case:
    """One call of an op, forward and backward."""

    name: str
    call: Callable[[], None]


def cases(shapes: Shapes = Shapes()) -> Iterator[Case]:
    """Every kernel with every shape class of its configuration table."""
    half, single = torch.bfloat16, torch.float32
    for dtype, rank, drop in (
        (half, 16, False), (half, 16, True), (half, 128, False), (half, 128, True),
        (single, 16, False), (single, 128, True),
    ):  # fmt: skip
        name = f"{_short(dtype)} r{rank}{' dropout' if drop else ''}"
        yield Case(f"lora_linear {name}", partial(_lora_linear, shapes, dtype, rank, drop))
    for frozen in ("A", "B"):
        yield Case(f"lora_linear bf16 r16 frozen {frozen}", partial(_lora_linear, shapes, half, 16, False, frozen))
    yield Case("lora_linear bf16 r16 without weight", partial(_lora_linear, shapes, half, 16, False, weighted=False))
    for dtype, rank in ((half, 16), (half, 32), (half, 128), (single, 16)):
        yield Case(f"products {_short(dtype)} r{rank}", partial(_products, shapes, dtype, rank, shapes.width))
    # These do not fill the widest tiles.
    yield Case("products bf16 r16 half as wide", partial(_products, shapes, half, 16, shapes.width // 2))
    yield from _blocks(shapes)
    for dtype in (half, single):
        yield Case(f"head {_short(dtype)}", partial(_head, shapes, dtype))
    for dtype, rank in ((half, 32), (half, 128), (single, 32), (single, 128)):
        yield Case(f"low_rank_add {_short(dtype)} r{rank}", partial(_low_rank_add, shapes, dtype, rank))
    yield Case("optimizers fp32", partial(_optimizers, shapes, None))
    yield Case("optimizers fp32, bf16 shadow, zero_grad", partial(_optimizers, shapes, half))
    for dtype in (half, torch.float64):
        yield Case(f"aggregate {_short(dtype)}", partial(_aggregate, shapes, dtype))


def _blocks(shapes: Shapes) -> Iterator[Case]:
    """Blocks of a ViT and of a LLaMA with a quarter of the heads for keys."""
    half, single = torch.bfloat16, torch.float32
    vit = BlockShape(shapes.width, shapes.outputs, 4, 4, gated=False, rank=16)
    llama = replace(vit, key_heads=1, gated=True)
    scaled, some = replace(vit, scaled=True), replace(vit, without=(1, 3, 4))
    calls: tuple[tuple[str, BlockShape, torch.dtype, dict[str, Any]], ...] = (
        ("", scaled, half, {}),
        (" dropout", scaled, half, {"drop": True}),
        (" all rows", vit, half, {"indexed": False}),
        (" tanh", vit, half, {"activation": "gelu_tanh"}),
        (" frozen A", vit, half, {"frozen": "A"}),
        (" frozen B", vit, half, {"frozen": "B"}),
        (" some Linears", some, half, {}),
        ("", replace(scaled, rank=32), half, {}),
        ("", replace(vit, rank=128), half, {}),
        (" dropout", replace(vit, rank=128), half, {"drop": True}),
        ("", vit, single, {}),
        (" dropout", replace(scaled, rank=128), single, {"drop": True}),
        (" SwiGLU", llama, half, {}),
        (" SwiGLU, dropout", llama, half, {"drop": True}),
        (" SwiGLU", replace(llama, rank=128), half, {}),
        (" SwiGLU", llama, single, {}),
    )
    for what, shape, dtype, options in calls:
        name = f"stream_block {_short(dtype)} r{shape.rank}{what}"
        yield Case(name, partial(_stream_block, shapes, shape, dtype, **options))


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
    return {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}[dtype]


def _lora_linear(
    shapes: Shapes, dtype: torch.dtype, rank: int, drop: bool, frozen: str = "", *, weighted: bool = True
) -> None:
    x = torch.zeros(shapes.rows, shapes.width, dtype=dtype, requires_grad=True)
    a, b = shapes.bank(rank, shapes.width, dtype=dtype), shapes.bank(shapes.outputs, rank, dtype=dtype)
    weight = torch.zeros(shapes.outputs, shapes.width, dtype=dtype) if weighted else None
    bias = torch.zeros(shapes.outputs, dtype=dtype) if weighted else None
    sink_a = None if frozen == "A" else torch.zeros_like(a, dtype=torch.float32)
    sink_b = None if frozen == "B" else torch.zeros_like(b, dtype=torch.float32)
    y = lora_linear(x, weight, bias, a, b, shapes.groups(), 0.5, sink_a, sink_b, shapes.dropout() if drop else None)
    y.backward(torch.zeros_like(y))


def _products(shapes: Shapes, dtype: torch.dtype, rank: int, width: int) -> None:
    """Query, key and value at once, the gradient of their input, and what ends in the residual stream."""
    groups = shapes.groups()

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=dtype)

    x, bank, merged = zeros(shapes.rows, width), shapes.bank(width, rank, dtype=dtype), zeros(3 * width, width)
    tables = groups.spans(gemm_tile(x, rank).rows), groups.filled
    shrunk, lora_a = zeros(shapes.rows, 3 * rank), shapes.bank(3 * rank, width, dtype=dtype)
    lora_gemm([x], merged, None, shrunk, [bank] * 3, [width] * 3, *tables, 0.7)
    lora_gemm([x] * 3, merged, None, shrunk, [lora_a], [width], *tables, None, transposed=True)
    stream, index, scale = zeros(2 * shapes.rows, width), torch.arange(shapes.rows), zeros(width)
    one = ([x], zeros(width, width), scale, zeros(shapes.rows, rank), [bank], [width], *tables, 0.7, None, 0, False)
    lora_gemm_onto(stream, index, *one, stream, index, scale)
    lora_gemm(*one, stream, index, scale)
    if rank <= NARROW_RANK:
        tables = groups.spans(single_pass_tile(x, rank).rows), groups.filled
        factors = shapes.bank(rank, width, dtype=dtype), bank
        single = (x, zeros(width, width), scale, *factors, *tables, 0.7)
        lora_single_pass_onto(stream, index, *single, stream, index, scale)
        lora_single_pass(*single)


def _stream_block(
    shapes: Shapes,
    shape: BlockShape,
    dtype: torch.dtype,
    *,
    activation: Activation | None = None,
    drop: bool = False,
    indexed: bool = True,
    frozen: str = "",
) -> None:
    draw = frozen_zeros(dtype, torch.device("cpu"))
    block = shape.block(draw)
    if activation is not None:
        block = replace(block, activation=activation)
    bank = shapes.bank(shape.slot_size, dtype=dtype)
    stream = draw(2 * shapes.rows if indexed else shapes.rows, shapes.width).requires_grad_()
    result = stream_block(
        stream * 1.0,
        torch.arange(shapes.rows) if indexed else None,
        block,
        # Of every output, so that every one gets a gradient; what lies between is no kernel of this project.
        lambda projected: projected[0] + projected[1].sum() + projected[2].sum(),
        bank,
        torch.zeros_like(bank, dtype=torch.float32),
        shapes.groups(),
        [shapes.dropout() if number in shape.adapted else None for number in range(len(shape.linears))] if drop else (),
        trains_a=frozen != "A",
        trains_b=frozen != "B",
    )
    result.backward(torch.zeros_like(result))


def _head(shapes: Shapes, dtype: torch.dtype) -> None:
    features = torch.zeros(shapes.rows, shapes.width, dtype=dtype, requires_grad=True)
    weight, bias = shapes.bank(shapes.classes, shapes.width, dtype=dtype), shapes.bank(shapes.classes, dtype=dtype)
    sinks = torch.zeros_like(weight, dtype=torch.float32), torch.zeros_like(bias, dtype=torch.float32)
    labels = torch.zeros(shapes.rows, dtype=torch.int64)
    losses, _ = head_cross_entropy(features, weight, bias, labels, shapes.groups(), *sinks)
    losses.backward(torch.ones_like(losses))


def _low_rank_add(shapes: Shapes, dtype: torch.dtype, rank: int) -> None:
    hidden = torch.zeros(2 * shapes.rows, shapes.width, dtype=dtype, requires_grad=True)
    sizes = (shapes.width, rank), (rank, shapes.width), (rank,), (shapes.width,)
    total = low_rank_add(hidden * 1.0, torch.arange(shapes.rows), *(torch.zeros(size, dtype=dtype) for size in sizes))
    total.backward(torch.zeros_like(total))


def _optimizers(shapes: Shapes, shadow_dtype: torch.dtype | None) -> None:
    param, grad, mean, square = (shapes.bank(shapes.slot) for _ in range(4))
    count = len(shapes.sizes)
    slots, ones, step = torch.arange(count), torch.ones(count), torch.ones(count, dtype=torch.int64)
    lower = shadow_dtype is not None
    shadow = shapes.bank(shapes.slot, dtype=shadow_dtype) if shadow_dtype is not None else None
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


def _aggregate(shapes: Shapes, dtype: torch.dtype) -> None:
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    slots = torch.arange(len(shapes.sizes))
    numerator, denominator = torch.zeros(12, shapes.slot, dtype=sums), torch.zeros(12, dtype=sums)
    weights = torch.ones(len(slots), dtype=sums)
    aggregate(numerator, denominator, shapes.bank(shapes.slot, dtype=dtype), slots, slots % 12, weights)
