"""A fitting call of every op, and the ways in which one of its tensors can fail to fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.block_shapes import BlockShape
from fedra_kernels import (
    Dropout,
    RowGroups,
    adamw,
    aggregate,
    finish_aggregate,
    head_cross_entropy,
    head_logits,
    lora_linear,
    low_rank_add,
    sgd,
    squared_changes,
    squared_norms,
    stream_block,
)

ROWS, INPUTS, OUTPUTS, RANK, SLOTS, CLASSES, SIZE = 5, 16, 24, 4, 3, 6, 40


@dataclass(frozen=True)
class Call:
    """An op and arguments that fit it.

    leading: the tensor that the others are compared with. free: what may be otherwise, since it is an op of any
    leading dimensions, number of rows or dtype, and others are then compared with it.
    """

    op: Callable[..., Any]
    arguments: dict[str, Any]
    leading: str
    free: tuple[str, ...] = ()

    def tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.arguments.items() if isinstance(value, Tensor)}


def calls(device: str) -> dict[str, Call]:
    """A call of every op whose arguments fit, by name."""

    def some(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.ones(*shape, dtype=dtype, device=device)

    def numbers(count: int) -> Tensor:
        return torch.arange(count, device=device)

    groups = RowGroups([3, 0, 2], torch.tensor([2, 1, 0]), device)
    adapter = {"lora_a": some(SLOTS, RANK, INPUTS), "groups": groups, "dropout": Dropout(0.1, numbers(3))}
    linear = {
        "x": some(ROWS, INPUTS), "weight": some(OUTPUTS, INPUTS), "bias": some(OUTPUTS), **adapter,
        "scale": 0.5, "lora_b": some(SLOTS, OUTPUTS, RANK), "grad_a": some(SLOTS, RANK, INPUTS),
        "grad_b": some(SLOTS, OUTPUTS, RANK),
    }  # fmt: skip
    shape = BlockShape(INPUTS, OUTPUTS, 2, 2, gated=False, rank=RANK)
    block = {
        "stream": some(8, INPUTS), "index": numbers(ROWS), "block": shape.block(some), "attend": sum,
        "bank": some(SLOTS, shape.slot_size), "gradients": some(SLOTS, shape.slot_size), "groups": groups,
        "dropout": [Dropout(0.1, numbers(3))] * 6,
    }  # fmt: skip
    heads = {
        "features": some(ROWS, INPUTS), "weight": some(SLOTS, CLASSES, INPUTS), "bias": some(SLOTS, CLASSES),
        "groups": groups, "grad_weight": some(SLOTS, CLASSES, INPUTS), "grad_bias": some(SLOTS, CLASSES),
    }  # fmt: skip
    step = {
        "param": some(4, SIZE), "grad": some(4, SIZE), "slots": numbers(3), "lr": some(3), "clip": some(3),
        "step": numbers(3) + 1,
        "shadow": some(4, SIZE, dtype=torch.bfloat16), "weight_decay": 0.1,
    }  # fmt: skip
    adam = {"exp_avg": some(4, SIZE), "exp_avg_sq": some(4, SIZE), "betas": (0.9, 0.9), "eps": 1e-8}
    sums = {"numerator": some(2, SIZE), "denominator": some(2)}
    return {
        "lora_linear": Call(lora_linear, linear, "x", ("x dimension",)),
        "stream_block": Call(stream_block, block, "stream", ("stream dimension", "index extent", "bank extent")),
        "low_rank_add": Call(
            low_rank_add,
            {
                "stream": some(8, INPUTS), "index": numbers(ROWS), "down": some(INPUTS, RANK),
                "up": some(RANK, INPUTS), "shift": some(RANK), "bias": some(INPUTS),
            },
            "stream",
            ("stream dimension", "index extent"),
        ),
        "head_cross_entropy": Call(head_cross_entropy, {**heads, "labels": numbers(ROWS)}, "features"),
        "head_logits": Call(head_logits, heads, "features"),
        "sgd": Call(sgd, {**step, "momentum_buffer": some(4, SIZE), "momentum": 0.9}, "param"),
        "adamw": Call(adamw, {**step, **adam}, "param"),
        "squared_norms": Call(squared_norms, {"grad": some(4, SIZE), "slots": numbers(3)}, "grad", ("slots extent",)),
        "squared_changes": Call(
            squared_changes,
            {"after": some(4, SIZE), "slots": numbers(3), "before": some(3, SIZE), "rows": numbers(3)},
            "after",
            ("slots extent",),
        ),
        "aggregate": Call(
            aggregate,
            {**sums, "values": some(4, SIZE), "slots": numbers(2), "blocks": numbers(2), "weights": some(2)},
            "numerator",
            ("slots extent",),
        ),
        "finish_aggregate": Call(finish_aggregate, {**sums, "previous": some(2, SIZE)}, "numerator"),
    }  # fmt: skip


def misfits(call: Call, other_device: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(argument, what is wrong with it, arguments with that tensor replaced)."""
    for name, tensor in call.tensors().items():
        ways = {"dimension": tensor[None], "dtype": tensor.to(torch.complex64)}
        if name != call.leading:
            longer = torch.cat([tensor, tensor[..., :1]], dim=-1)
            ways |= {"extent": longer, "device": torch.empty_like(tensor, device=other_device)}
        for what, wrong in ways.items():
            if f"{name} {what}" in call.free:
                continue
            yield name, what, {**call.arguments, name: wrong}
