"""Rows × features, and slots × parameters, beyond 2³¹: every kernel's offsets are 64-bit.

The memory is mapped and takes room only where it is touched, and only the last program of a launch runs, which works
at the far end of every tensor; its results are those of a small problem.
"""

import mmap
import sys
from math import prod

import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter as triton_interpreter

from fedra_kernels import RowGroups, adamw, aggregate, lora_linear, sgd, squared_norms
from fedra_kernels.activation_kernels import activation_backward, activation_forward, activation_tile
from fedra_kernels.counter_hash import Dropout
from fedra_kernels.gather_norm_backward import gather_norm_backward
from fedra_kernels.gather_norm_forward import gather_norm_forward, norm_tile
from fedra_kernels.head_loss import head_loss, head_loss_backward
from fedra_kernels.head_products import head_grads, head_product, product_tile
from fedra_kernels.scatter_add import scatter_add_rows

from ..helpers import randn

NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
"""Python names Linux's flag since 3.13."""
WIDTH, LAST = 1024, 16
BEFORE = 2**31 // WIDTH + 32
"""Rows before the last ones: at the features of any later row, a 32-bit offset is negative."""
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def mapped(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Zeros that take memory where they are touched."""
    size = max(prod(shape), 1)
    memory = mmap.mmap(-1, size * dtype.itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
    return torch.frombuffer(memory, dtype=dtype, count=size)[: prod(shape)].view(shape)


@pytest.fixture(autouse=True)
def _last_program(monkeypatch):
    """The interpreter runs the last program of each launch alone, and what the ops allocate is mapped."""
    launch = triton_interpreter.GridExecutor.__call__.__code__

    def last(*bounds):
        return range(*bounds)[-1:] if sys._getframe(1).f_code is launch else range(*bounds)

    def new(self, *size, dtype=None, **_):
        return mapped(*torch.Size(size[0] if not isinstance(size[0], int) else size), dtype=dtype or self.dtype)

    monkeypatch.setattr(triton_interpreter, "range", last, raising=False)
    # The interpreter copies every argument back to its device: here onto itself, all of it.
    monkeypatch.setattr(triton_interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)
    for name in ("new_empty", "new_zeros"):
        monkeypatch.setattr(Tensor, name, new)


def _draw(*shape, seed, dtype=torch.float32):
    return randn(*shape, seed=seed, dtype=torch.float32).to(dtype)


def _after(rows: Tensor) -> Tensor:
    """The same rows at the end of a matrix beyond 2³¹."""
    matrix = mapped(BEFORE + len(rows), *rows.shape[1:], dtype=rows.dtype)
    matrix[BEFORE:] = rows
    return matrix


def _groups(alone: bool) -> RowGroups:
    """Slot 2 of a bank has the last rows, slot 0 those before."""
    sizes, slots = ([LAST], [2]) if alone else ([BEFORE, LAST], [0, 2])
    return RowGroups(sizes, torch.tensor(slots), torch.full((len(sizes),), 0.5))


def _bank(values: Tensor) -> Tensor:
    """[3, *values.shape]: `values` in slot 2, whose offset is beyond 2³¹."""
    bank = mapped(3, 2**30 + 16, dtype=values.dtype)[:, : values.numel()].view(3, *values.shape)
    bank[2] = values
    return bank


@DTYPES
@pytest.mark.parametrize(("outputs", "rank", "dropout"), [(32, 8, None), (WIDTH, 8, 0.3), (WIDTH, 40, None)])
def test_lora_linear(dtype, outputs, rank, dropout):
    x, grad_y = _draw(LAST, WIDTH, seed=0, dtype=dtype), _draw(LAST, outputs, seed=1, dtype=dtype)
    weight = _draw(outputs, WIDTH, seed=2, dtype=dtype)
    lora_a, lora_b = (_bank(_draw(*shape, seed=3, dtype=dtype)) for shape in ((rank, WIDTH), (outputs, rank)))

    def run(x, grad_y, alone):
        groups = _groups(alone)
        drop = None if dropout is None else Dropout(dropout, torch.arange(len(groups)).flip(0))
        sinks = [_bank(torch.zeros(bank.shape[1:])) for bank in (lora_a, lora_b)]
        x = x.detach().requires_grad_()
        y = lora_linear(x, weight, None, lora_a, lora_b, groups, *sinks, drop)
        (grad_x,) = torch.autograd.grad(y, x, grad_y)
        # What a last program writes: one tile, one block of columns, one piece of a slot.
        return y[-LAST:, -32:], grad_x[-LAST:, -32:], sinks[0][2, -1, -32:], sinks[1][2, -16:]

    expected = run(x, grad_y, alone=True)
    for found, want in zip(run(_after(x), _after(grad_y), alone=False), expected, strict=True):
        assert want.any()
        assert torch.equal(found, want)


@DTYPES
@pytest.mark.parametrize("shrinks", [0, 1])
def test_gather_norm_and_scatter_add(dtype, shrinks):
    hidden, ones, grad = (_draw(*shape, seed=7, dtype=dtype) for shape in ((LAST, WIDTH), (WIDTH,), (LAST, WIDTH)))
    banks = [_bank(_draw(8, WIDTH, seed=3, dtype=dtype))] * shrinks

    def run(hidden, grad, index, alone):
        groups = _groups(alone)
        chunks = groups.chunks(norm_tile(hidden, banks).rows).rows if banks else None
        x, rows, mean, inverse, *shrunk = gather_norm_forward(
            hidden, index, ones, ones, 1e-5, False, True, banks, chunks, None, 0
        )
        stream = torch.zeros_like(hidden[-LAST:]) if alone else mapped(*hidden.shape, dtype=dtype)
        gather_norm_backward(grad, index, ones, rows, mean, inverse, False, stream)
        scatter_add_rows(hidden, x, index, ones)
        # The last program of scatter_add has the last columns alone.
        return [tensor[-LAST:] for tensor in (x, *shrunk, stream)] + [hidden[-LAST:, -256:]]

    order = torch.randperm(LAST, generator=torch.Generator().manual_seed(1))
    expected = run(hidden.clone(), grad, order, alone=True)
    index = torch.cat([torch.zeros(BEFORE, dtype=torch.int64), BEFORE + order])
    for found, want in zip(run(_after(hidden), _after(grad), index, alone=False), expected, strict=True):
        assert want.any()
        assert torch.equal(found, want)


@DTYPES
@pytest.mark.parametrize("shrinks", [False, True])
def test_activations(dtype, shrinks):
    x, up, grad = (_draw(LAST, WIDTH, seed=seed, dtype=dtype) for seed in range(3))
    bank = _bank(_draw(8, WIDTH, seed=3, dtype=dtype)) if shrinks else None

    def run(x, up, grad, alone):
        chunks = None if bank is None else _groups(alone).chunks(activation_tile(x, bank).rows).rows
        y, *shrunk = activation_forward("swiglu", x, up, bank, chunks, None, 0)
        # The last program of the backward has the last two rows.
        return [part[-LAST:] for part in (y, *shrunk)] + [g[-2:] for g in activation_backward("swiglu", grad, x, up)]

    expected = run(x, up, grad, alone=True)
    for found, want in zip(run(*map(_after, (x, up, grad)), alone=False), expected, strict=True):
        assert want.any()
        assert torch.equal(found, want)


@DTYPES
def test_heads_of_many_samples(dtype):
    classes = WIDTH
    logits, features = _draw(LAST, classes, seed=1), _draw(LAST, 32, seed=2, dtype=dtype)
    weight, labels = _bank(_draw(classes, 32, seed=3, dtype=dtype)), torch.arange(LAST)

    def run(logits, half, features, labels, alone):
        groups, sinks = _groups(alone), (_bank(torch.zeros(classes, 32)), _bank(torch.zeros(classes)))
        chunks = groups.chunks(product_tile(features).rows).rows
        losses, _, log_sums = head_loss(logits, labels, groups.filled, len(groups))
        grad = head_loss_backward(logits, labels, log_sums, torch.ones(len(groups)), chunks, features)
        product = head_product(features, weight, None, chunks, False)
        back = head_product(half, weight, None, chunks, True)
        head_grads(features, half, groups.filled, *sinks)
        far = losses[-1:], log_sums[-LAST:], grad[-LAST:, -16:], product[-LAST:, -16:], back[-LAST:, -16:]
        return [*far, sinks[0][2, -16:], sinks[1][2, -16:]]

    half = logits.to(dtype)
    expected = run(logits, half, features, labels, alone=True)
    large = _after(logits), _after(half), _after(features), torch.cat([torch.zeros(BEFORE, dtype=torch.int64), labels])
    for found, want in zip(run(*large, alone=False), expected, strict=True):
        assert want.any()
        assert torch.equal(found, want)


@DTYPES
def test_heads_of_many_classes(dtype):
    """A classifier of one slot has more than 2³¹ weights."""
    groups = RowGroups([LAST], torch.tensor([0]), torch.ones(1))
    features, part = _draw(LAST, WIDTH, seed=1, dtype=dtype), _draw(LAST, WIDTH, seed=2, dtype=dtype)
    grad = _draw(LAST, LAST, seed=3, dtype=dtype)
    chunks = groups.chunks(product_tile(features).rows).rows

    def run(weight, grad):
        sink, bias = mapped(*weight.shape), mapped(*weight.shape[:2])
        head_grads(features, grad, groups.filled, sink, bias)
        return head_product(features, weight, None, chunks, False)[:, -16:], sink[0, -16:, -32:]

    expected = run(part[None], grad)
    wide = mapped(LAST, BEFORE + LAST, dtype=dtype)
    wide[:, BEFORE:] = grad
    for found, want in zip(run(_after(part)[None], wide), expected, strict=True):
        assert want.any()
        assert torch.equal(found, want)


@DTYPES
def test_slots_of_a_large_bank(dtype):
    size, slots = 100, torch.tensor([0, 2])
    banks = [_draw(size, seed=seed, dtype=dtype).abs() for seed in range(4)]

    def run(banks, slots):
        count = torch.ones(len(slots))
        param, grad, mean, square = banks
        norms = squared_norms(grad, slots)
        sgd(param, grad, mean, slots, count, count, count.long() + 2, momentum=0.9, weight_decay=0.1)
        adamw(
            param, grad, mean, square, slots, count, count, count.long() + 2,
            betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, zero_grad=True,
        )  # fmt: skip
        sums, totals = mapped(3, 2**30 + 16)[:, :size], torch.zeros(3)
        aggregate(sums, totals, param, slots, slots - slots[-1] + 2, count)
        return [norms[-1], sums[2], *(bank[slots[-1]] for bank in banks)]

    expected = run([bank[None].clone() for bank in banks], torch.tensor([0]))
    found = run([_bank(bank) for bank in banks], slots)
    for have, want in zip(found, expected, strict=True):
        assert torch.equal(have, want)
