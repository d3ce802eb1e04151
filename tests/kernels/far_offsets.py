"""Every kernel at the far end of tensors beyond 2³¹ elements, against the same values in small ones.

Rows × features, slots × parameters, classes × features: there an offset in 32 bits would be negative. What is compared
is what the last program of each launch writes, so that the interpreter need not run the others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fedra_kernels import Dropout, RowGroups, adamw, aggregate, lora_linear, sgd, squared_norms
from fedra_kernels._kernels.activation import activation_forward, activation_tile
from fedra_kernels._kernels.activation_gradient import activation_gradient
from fedra_kernels._kernels.configs import gradient_chunk
from fedra_kernels._kernels.gather_norm import gather_norm_backward, gather_norm_forward, norm_tile
from fedra_kernels._kernels.head_loss import head_loss, head_loss_backward
from fedra_kernels._kernels.head_products import head_grads, head_product, product_tile
from fedra_kernels._kernels.lora_gemm import gemm_tile, lora_gemm_onto
from fedra_kernels._kernels.lora_grad_outer import lora_grad_outer
from fedra_kernels._kernels.lora_grad_output import lora_grad_output
from fedra_kernels._kernels.lora_single_pass import lora_single_pass_onto, single_pass_tile
from fedra_kernels.low_rank_add import low_rank_add_rows

from .helpers import randn

WIDTH, LAST = 768, 16
RANK = 8
BEFORE = (2**31 // WIDTH // 32 + 2) * 32
"""Rows before the last ones: whole tiles of the interpreter."""
STRIDE = 2**30 + 16
"""Entries between the slots of a bank, of which the third is in use."""

Results = list[Tensor]


@dataclass(frozen=True)
class Far:
    """zeros: makes a tensor of a shape and dtype on the device; dtype: what the ops compute in."""

    zeros: Callable[[tuple[int, ...], torch.dtype], Tensor]
    device: str
    dtype: torch.dtype

    def draw(self, *shape: int, seed: int) -> Tensor:
        return randn(*shape, seed=seed, dtype=torch.float32).to(self.device, self.dtype)

    def after(self, rows: Tensor) -> Tensor:
        """The same rows at the end of a large matrix."""
        matrix = self.zeros((BEFORE + len(rows), *rows.shape[1:]), rows.dtype)
        matrix[BEFORE:] = rows
        return matrix

    def banks(self, *parts: Tensor) -> list[Tensor]:
        """[3, *shape] of each part: its values are in the third slot of one large bank."""
        size = sum(part.numel() for part in parts)
        entries = self.zeros((2 * STRIDE + size,), parts[0].dtype)
        columns = entries.as_strided((3, size), (STRIDE, 1)).split([part.numel() for part in parts], dim=1)
        banks = [some.unflatten(1, part.shape) for some, part in zip(columns, parts, strict=True)]
        for bank, part in zip(banks, parts, strict=True):
            bank[2] = part
        return banks

    def sinks(self, *banks: Tensor, alone: bool) -> list[Tensor]:
        """fp32 zeros shaped as the banks, which are far apart unless `alone`."""
        parts = [torch.zeros(bank.shape[1:], device=self.device) for bank in banks]
        return [part.expand(3, *part.shape).contiguous() for part in parts] if alone else self.banks(*parts)

    def reversed_rows(self) -> Tensor:
        """int64: all rows of a large matrix, the last ones in reverse."""
        index = torch.arange(BEFORE + LAST, device=self.device)
        index[BEFORE:] = index[BEFORE:].flip(0)
        return index

    def sums(self, rows: Tensor, columns: int, alone: bool) -> tuple[Tensor, Tensor]:
        """The table of the chunks of rows, and fp32 zeros for their sums, as many as lie beyond 2³¹ unless `alone`."""
        chunks = self.groups(alone).chunks(gradient_chunk(rows)).rows
        width = columns if alone else 2**31 // (len(chunks) - 1) + columns
        return chunks, self.zeros((len(chunks), width), torch.float32)

    def groups(self, alone: bool) -> RowGroups:
        """The third slot has the last rows, the first those before."""
        sizes, slots = ([LAST], [2]) if alone else ([BEFORE, LAST], [0, 2])
        return RowGroups(sizes, torch.tensor(slots), self.device)


def _lora_linear(far: Far, outputs: int, rank: int, dropout: float | None) -> tuple[Results, Results]:
    x, grad_y = far.draw(LAST, WIDTH, seed=0), far.draw(LAST, outputs, seed=1)
    weight = far.draw(outputs, WIDTH, seed=2)
    lora_a, lora_b = far.banks(far.draw(rank, WIDTH, seed=3), far.draw(outputs, rank, seed=4))

    def run(x: Tensor, grad_y: Tensor, alone: bool) -> Results:
        groups = far.groups(alone)
        drop = None if dropout is None else Dropout(dropout, torch.arange(len(groups), device=far.device).flip(0))
        sink_a, sink_b = far.sinks(lora_a, lora_b, alone=alone)
        x = x.detach().requires_grad_()
        # The last program of a launch that adds both gradients adds one of B.
        y = lora_linear(x, weight, None, lora_a, lora_b, groups, 0.5, sink_a, None, drop)
        torch.autograd.grad(y, x, grad_y)
        y = lora_linear(x, weight, None, lora_a, lora_b, groups, 0.5, None, sink_b, drop)
        (grad_x,) = torch.autograd.grad(y, x, grad_y)
        return [y[-LAST:, -32:].detach(), grad_x[-LAST:, -32:], sink_a[2, -1, -32:], sink_b[2, -16:]]

    return run(far.after(x), far.after(grad_y), alone=False), run(x, grad_y, alone=True)


def _norm(far: Far, shrinks: int) -> tuple[Results, Results]:
    hidden, ones, grad = (far.draw(*shape, seed=7) for shape in ((LAST, WIDTH), (WIDTH,), (LAST, WIDTH)))
    banks = far.banks(far.draw(8, WIDTH, seed=3)) * shrinks

    def run(hidden: Tensor, grad: Tensor, index: Tensor, alone: bool) -> Results:
        chunks = far.groups(alone).chunks(norm_tile(hidden, banks).rows).rows if banks else None
        x, rows, mean, inverse, shrunk = gather_norm_forward(
            hidden, index, ones, ones, 1e-5, False, banks, chunks, [], 0
        )
        out = far.zeros(tuple(hidden.shape), far.dtype)
        gather_norm_backward(grad, ones, rows, mean, inverse, False, hidden, index, out, index)
        return [tensor[-LAST:] for tensor in (x, rows, out, *([shrunk] if banks else []))]

    index = far.reversed_rows()
    large = run(far.after(hidden), far.after(grad), index, alone=False)
    return large, run(hidden, grad, index[BEFORE:] - BEFORE, alone=True)


def _output_gradient(far: Far) -> tuple[Results, Results]:
    grad, scale, shrunk = far.draw(LAST, WIDTH, seed=1), far.draw(WIDTH, seed=2), far.draw(LAST, RANK, seed=3)
    bank, size = far.banks(far.draw(WIDTH, RANK, seed=4))[0], RANK * WIDTH

    def run(grad: Tensor, shrunk: Tensor, index: Tensor, alone: bool) -> Results:
        chunks, sums = far.sums(grad, size, alone)
        column = sums.shape[1] - size
        found = lora_grad_output([grad], [bank], shrunk, chunks, sums, [column], 0.5, index, scale)
        return [*(part[-LAST:] for part in found), sums[-1, column:]]

    index = far.reversed_rows()
    large = run(far.after(grad), far.after(shrunk), index, alone=False)
    return large, run(grad, shrunk, index[BEFORE:] - BEFORE, alone=True)


def _factor_gradient(far: Far) -> tuple[Results, Results]:
    """Of a layer that has read a norm."""
    rows, weight, narrow = far.draw(LAST, WIDTH, seed=1), far.draw(WIDTH, seed=2), far.draw(LAST, RANK, seed=3)
    moments, size = (rows.float().mean(1), rows.float().square().mean(1)), RANK * WIDTH

    def run(rows: Tensor, narrow: Tensor, mean: Tensor, inverse: Tensor, alone: bool) -> Results:
        chunks, sums = far.sums(rows, size, alone)
        column = sums.shape[1] - size
        lora_grad_outer(rows, narrow, chunks, sums, column, 0, RANK, True, 1.0, None, 0, mean, inverse, weight, weight)
        return [sums[-1, column:].view(RANK, WIDTH)[:, -32:]]

    return run(*map(far.after, (rows, narrow, *moments)), alone=False), run(rows, narrow, *moments, alone=True)


def _onto_the_stream(far: Far, single_pass: bool) -> tuple[Results, Results]:
    stream, x, bias = far.draw(LAST, WIDTH, seed=1), far.draw(LAST, 32, seed=2), far.draw(WIDTH, seed=3)
    weight, shrunk = far.draw(WIDTH, 32, seed=4), far.draw(LAST, RANK, seed=5)
    lora_a, lora_b = far.banks(far.draw(RANK, 32, seed=6), far.draw(WIDTH, RANK, seed=7))

    def run(stream: Tensor, x: Tensor, shrunk: Tensor, index: Tensor, alone: bool) -> Results:
        groups, beside = far.groups(alone), (stream, index, bias)
        if single_pass:
            tables = groups.spans(single_pass_tile(x, RANK).rows), groups.filled
            lora_single_pass_onto(stream, index, x, weight, bias, lora_a, lora_b, *tables, 0.5, *beside)
        else:
            tables = groups.spans(gemm_tile(x, RANK).rows), groups.filled
            product = ([x], weight, bias, shrunk, [lora_b], [WIDTH], *tables, 0.5, None, 0, False)
            lora_gemm_onto(stream, index, *product, *beside)
        return [stream[-LAST:, -32:]]

    index = far.reversed_rows()
    large = run(*map(far.after, (stream, x, shrunk)), index, alone=False)
    return large, run(stream.clone(), x, shrunk, index[BEFORE:] - BEFORE, alone=True)


def _low_rank(far: Far) -> tuple[Results, Results]:
    stream, down, bias = (far.draw(*shape, seed=7) for shape in ((LAST, WIDTH), (WIDTH, 20), (WIDTH,)))

    def run(stream: Tensor, index: Tensor) -> Results:
        low_rank_add_rows(stream, index, down, down.T, bias[:20], bias)
        return [stream[-LAST:]]

    index = torch.arange(LAST, device=far.device).flip(0)
    return run(far.after(stream), index + BEFORE), run(stream, index)


def _activation(far: Far, shrinks: bool) -> tuple[Results, Results]:
    x, up, grad = (far.draw(LAST, WIDTH, seed=seed) for seed in range(3))
    narrow, size = far.draw(LAST, RANK, seed=4), RANK * WIDTH
    bank = far.banks(far.draw(RANK, WIDTH, seed=3))[0] if shrinks else None

    def run(x: Tensor, up: Tensor, grad: Tensor, narrow: Tensor, alone: bool) -> Results:
        chunks = None if bank is None else far.groups(alone).chunks(activation_tile(x, bank).rows).rows
        y, *shrunk = activation_forward("swiglu", x, up, bank, chunks, None, 0)
        found = [part[-LAST:].clone() for part in (y, *shrunk)]
        # Its memory is taken again: together the matrices would not fit many a GPU.
        grad_x, grad_up = y, far.zeros(tuple(x.shape), far.dtype)
        chunks, sums = far.sums(x, 2 * size, alone)
        column = sums.shape[1] - 2 * size
        activation_gradient(
            "swiglu", grad, x, up, grad_x, grad_up, chunks, sums, narrow, column, None, 0, narrow, column + size, 0.5
        )
        grad_a, grad_b = sums[-1, column:].split(size)
        return [
            *found,
            grad_x[-LAST:, -32:],
            grad_up[-LAST:, -32:],
            grad_a.view(RANK, WIDTH)[:, -32:],
            grad_b[-32 * RANK :],
        ]

    small = x, up, grad, narrow
    return run(*map(far.after, small), alone=False), run(*small, alone=True)


def _samples(far: Far) -> tuple[Results, Results]:
    """Logits of many samples."""
    half, features, classes = far.draw(LAST, WIDTH, seed=1), far.draw(LAST, 32, seed=2), WIDTH
    (weight,) = far.banks(far.draw(classes, 32, seed=3))

    def run(half: Tensor, logits: Tensor, features: Tensor, labels: Tensor, alone: bool) -> Results:
        groups, sinks = far.groups(alone), far.sinks(weight, weight[..., 0], alone=alone)
        chunks, shares = groups.chunks(product_tile(features).rows).rows, torch.ones(len(groups), device=far.device)
        losses, _, log_sums = head_loss(logits, labels, groups.filled, len(groups))
        # Copies of the ends: three of the matrices together would not fit many a GPU.
        grad = head_loss_backward(logits, labels, log_sums, shares, chunks, features)[-LAST:, -16:].clone()
        product = head_product(features, weight, None, chunks, False)[-LAST:, -16:].clone()
        back = head_product(half, weight, None, chunks, True)[-LAST:, -16:].clone()
        head_grads(features, half, groups.filled, *sinks)
        return [losses[-1:], log_sums[-LAST:], grad, product, back, sinks[0][2, -16:], sinks[1][2, -16:]]

    small = half, half.float(), features, torch.arange(LAST, device=far.device)
    return run(*map(far.after, small), alone=False), run(*small, alone=True)


def _classes(far: Far) -> tuple[Results, Results]:
    """A classifier of many classes."""
    groups = RowGroups([LAST], torch.tensor([0]), far.device)
    features, part, grad = far.draw(LAST, WIDTH, seed=1), far.draw(LAST, WIDTH, seed=2), far.draw(LAST, LAST, seed=3)
    chunks = groups.chunks(product_tile(features).rows).rows

    def run(weight: Tensor, grad: Tensor) -> Results:
        sinks = [far.zeros(tuple(shape), torch.float32) for shape in (weight.shape, weight.shape[:2])]
        head_grads(features, grad, groups.filled, *sinks)
        return [head_product(features, weight, None, chunks, False)[:, -16:], sinks[0][0, -16:, -32:]]

    wide = far.zeros((LAST, BEFORE + LAST), far.dtype)
    wide[:, BEFORE:] = grad
    return run(far.after(part)[None], wide), run(part[None], grad)


def _slots(far: Far) -> tuple[Results, Results]:
    """The optimizers, the norms and the aggregation over a large bank."""
    values = [far.draw(100, seed=seed).abs() for seed in range(4)]

    def run(banks: list[Tensor], sums: Tensor, slots: list[int]) -> Results:
        param, grad, mean, square = banks
        where, ones = torch.tensor(slots, device=far.device), torch.ones(len(slots), device=far.device)
        norms = squared_norms(grad, where)
        sgd(param, grad, mean, where, ones, ones, ones.long() + 2, momentum=0.9, weight_decay=0.1)
        adamw(
            param, grad, mean, square, where, ones, ones, ones.long() + 2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1
        )
        aggregate(sums, sums.new_zeros(len(sums)), param, where, where - where[-1] + len(sums) - 1, ones)
        return [norms[-1], sums[-1], *(bank[slots[-1]] for bank in banks)]

    zeros = torch.zeros(100, device=far.device)
    large = run([far.banks(bank)[0] for bank in values], far.banks(zeros)[0], [0, 2])
    return large, run([bank[None].clone() for bank in values], zeros[None].clone(), [0])


CASES: dict[str, Callable[[Far], tuple[Results, Results]]] = {
    "lora_linear, single pass": lambda far: _lora_linear(far, 32, 8, None),
    "lora_linear, dropout": lambda far: _lora_linear(far, WIDTH, 8, 0.3),
    "lora_linear, wide rank": lambda far: _lora_linear(far, WIDTH, 40, None),
    "norm": lambda far: _norm(far, 0),
    "norm with a shrink": lambda far: _norm(far, 1),
    "dS and dB of rows": _output_gradient,
    "dA of the norm of rows": _factor_gradient,
    "product onto the stream": lambda far: _onto_the_stream(far, False),
    "single pass onto the stream": lambda far: _onto_the_stream(far, True),
    "low_rank_add": _low_rank,
    "swiglu": lambda far: _activation(far, False),
    "swiglu with a shrink": lambda far: _activation(far, True),
    "head, many samples": _samples,
    "head, many classes": _classes,
    "slots": _slots,
}


def check_far_end(case: str, far: Far) -> None:
    """The case's results at the far end of large tensors are those in small ones, bit for bit.

    Takes up to 34 GiB in bf16.
    """
    for found, expected in zip(*CASES[case](far), strict=True):
        assert expected.any()
        assert torch.equal(found, expected)
