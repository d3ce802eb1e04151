"""Meta tensors go through every op: shapes and dtypes without a GPU and without memory."""

from functools import partial

import pytest
import torch

from benchmarks.kernels.block_shapes import BlockShape
from fedra_kernels import (
    Dropout,
    RowGroups,
    adamw,
    aggregate,
    head_cross_entropy,
    head_logits,
    lora_linear,
    low_rank_add,
    sgd,
    squared_norms,
    stream_block,
)

from .helpers import SCALE

ROWS, WIDTH, OUTPUTS, RANK, SLOTS = 100_000, 768, 3072, 16, 64


def _meta(*shape, dtype=torch.bfloat16, grad=False):
    return torch.empty(*shape, dtype=dtype, device="meta", requires_grad=grad)


def _groups(rows=ROWS):
    return RowGroups([rows - 1, 0, 1], torch.tensor([3, 5, 9]), device="meta")


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("rank", [16, 64])
@pytest.mark.parametrize("gated", [False, True])
def test_a_transformer_block_runs_forward_and_backward(gated, rank, dropout, recompute):
    shape = BlockShape(WIDTH, OUTPUTS, 12, 3 if gated else 12, gated=gated, rank=rank, scaled=not gated)
    block, bank = shape.block(_meta), _meta(SLOTS, shape.slot_size)
    gradients = _meta(SLOTS, shape.slot_size, dtype=torch.float32)
    hidden, index = _meta(200, 1000, WIDTH, grad=True), _meta(ROWS, dtype=torch.int64)
    total = stream_block(
        hidden * 1.0, index, block, partial(shape.attend, tokens=1000), bank, gradients, _groups(),
        [Dropout(0.1, _meta(3, dtype=torch.int64))] * len(shape.linears) if dropout else (), recompute=recompute,
    )  # fmt: skip
    total = low_rank_add(total, index, _meta(WIDTH, 32), _meta(32, WIDTH), _meta(32), _meta(WIDTH))
    total.backward(torch.empty_like(total))
    assert hidden.grad.shape == total.shape == (200, 1000, WIDTH)


@pytest.mark.parametrize("frozen", [0, 1])
@pytest.mark.parametrize("rank", [16, 64])
def test_a_frozen_factor_still_gives_the_gradient_of_the_input(frozen, rank):
    x, bank = _meta(ROWS, WIDTH, grad=True), (_meta(SLOTS, rank, WIDTH), _meta(SLOTS, OUTPUTS, rank))
    sinks = [None if number == frozen else _meta(*part.shape, dtype=torch.float32) for number, part in enumerate(bank)]
    y = lora_linear(x, _meta(OUTPUTS, WIDTH), None, *bank, _groups(), SCALE, *sinks)
    y.backward(torch.empty_like(y))
    assert x.grad.shape == x.shape


def test_heads_optimizers_and_aggregation_keep_shapes_and_dtypes():
    groups, features = _groups(500), _meta(500, WIDTH, grad=True)
    weight, bias = _meta(SLOTS, 100, WIDTH), _meta(SLOTS, 100)
    labels = _meta(500, dtype=torch.int64)
    losses, correct = head_cross_entropy(features, weight, bias, labels, groups, weight, bias)
    losses.sum().backward()
    assert (losses.dtype, correct.dtype) == (torch.float32, torch.int64)
    assert features.grad.shape == features.shape
    logits = head_logits(features, weight, bias, groups, weight, bias)
    logits.backward(torch.empty_like(logits))
    assert (logits.shape, logits.dtype) == ((500, 100), torch.float32)
    param, state, slots = (
        _meta(SLOTS, 1000, dtype=torch.float32),
        _meta(SLOTS, 1000, dtype=torch.float32),
        _meta(3, dtype=torch.int64),
    )
    per_slot = _meta(3, dtype=torch.float32)
    step = _meta(3, dtype=torch.int64)
    sgd(param, state, state, slots, per_slot, per_slot, step, momentum=0.9, weight_decay=0.0)
    adamw(param, state, state, state, slots, per_slot, per_slot, step, betas=(0.9, 0.9), eps=1e-8, weight_decay=0.0)
    aggregate(_meta(12, 1000, dtype=torch.float32), _meta(12, dtype=torch.float32), param, slots, slots, per_slot)
    assert squared_norms(param, slots).shape == (3,)
