"""Every registered op is sound for torch.compile, and compiled calls equal eager ones."""

import pytest
import torch

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
    squared_norms,
    stream_block,
)
from fedra_kernels._kernels.activation import activation_forward, activation_tile
from fedra_kernels._kernels.activation_gradient import activation_gradient
from fedra_kernels._kernels.configs import gradient_chunk
from fedra_kernels._kernels.gather_norm import gather_norm_backward, gather_norm_forward, norm_tile
from fedra_kernels._kernels.head_loss import head_loss, head_loss_backward
from fedra_kernels._kernels.head_products import head_grads, head_product, product_tile
from fedra_kernels._kernels.lora_gemm import gemm_tile, lora_gemm, lora_gemm_onto
from fedra_kernels._kernels.lora_grad_outer import lora_grad_outer
from fedra_kernels._kernels.lora_grad_output import lora_grad_output
from fedra_kernels._kernels.lora_grad_reduce import lora_grad_reduce
from fedra_kernels._kernels.lora_shrink import lora_shrink, shrink_tile
from fedra_kernels._kernels.lora_single_pass import lora_single_pass, lora_single_pass_onto, single_pass_tile
from fedra_kernels.adamw import adamw_rows
from fedra_kernels.aggregate import aggregate_rows
from fedra_kernels.low_rank_add import low_rank_add_rows
from fedra_kernels.sgd import sgd_rows
from fedra_kernels.squared_norms import squared_norms_rows

from ..cases import assert_close, lora_case
from ..helpers import SCALE
from ..stream_cases import stream_case

ROWS, WIDTH, OUTPUTS, RANK = 20, 16, 24, 4


@pytest.fixture(autouse=True)
def _guarded_outputs():
    """Buffers without guards: torch's checks compare storage offsets, which a guarded buffer changes."""


def _op_calls():
    groups = RowGroups([12, 0, 8], torch.tensor([2, 1, 0]))
    x, y, rank = torch.randn(ROWS, WIDTH), torch.randn(ROWS, OUTPUTS), torch.randn(ROWS, RANK)
    a, b, weight = torch.randn(3, RANK, WIDTH), torch.randn(3, OUTPUTS, RANK), torch.randn(OUTPUTS, WIDTH)
    filled, keys = groups.filled, torch.arange(3)
    index, ones = torch.arange(ROWS), torch.ones(WIDTH)
    labels, slots, table = torch.zeros(ROWS, dtype=torch.int64), torch.arange(3), torch.ones(3)
    head, head_bias, logits = torch.randn(3, 5, WIDTH), torch.randn(3, 5), torch.randn(ROWS, 5)

    def bank():
        return torch.rand(3, 50)

    def chunks(length):
        return groups.chunks(length).rows

    pieces = groups.chunks(gradient_chunk(x))
    sums = torch.randn(len(pieces.rows), RANK * (WIDTH + OUTPUTS))
    moments = torch.zeros(ROWS), torch.ones(ROWS)
    rows, norm_chunks, spans = chunks(product_tile(x).rows), chunks(norm_tile(x, [a]).rows), groups.spans
    wide = x, x, x, torch.zeros_like(x), torch.zeros_like(x)
    ones_out, gemm_spans = torch.ones(OUTPUTS), spans(gemm_tile(x, RANK).rows)
    segments = ([x, x], torch.cat([weight, weight], 1), None, rank, [b[:, :9], None], [9, OUTPUTS - 9])
    gemm = (*segments, gemm_spans, filled, SCALE, None, 0, False)
    single_pass = (x, weight, None, a, b, spans(single_pass_tile(x, RANK).rows), filled, SCALE)
    return [
        (lora_shrink, (x, a, chunks(shrink_tile(x, RANK).rows), 2.0, keys, 5, False)),
        (lora_gemm, (*gemm, y, index, ones_out)),
        (lora_gemm_onto, (torch.zeros(ROWS, OUTPUTS), index, *gemm, y, index, ones_out)),
        (lora_single_pass, (*single_pass, y, index, ones_out)),
        (lora_single_pass_onto, (torch.zeros(ROWS, OUTPUTS), index, *single_pass, y, index, ones_out)),
        (lora_grad_output, ([y], [b], rank, pieces.rows, sums, [RANK * WIDTH], SCALE, index, ones_out)),
        (lora_grad_outer, (x, rank, pieces.rows, sums, 0, 0, RANK, True, SCALE, keys, 5, *moments, ones, ones)),
        (lora_grad_reduce, (sums, pieces.groups, torch.zeros_like(a), torch.zeros_like(b))),
        (gather_norm_forward, (x, index, ones, ones, 1e-5, False, [a, a], norm_chunks, [], 0)),
        (gather_norm_backward, (x, ones, x, *moments, False, x, index, torch.zeros_like(x), index)),
        (low_rank_add_rows, (torch.zeros(ROWS, WIDTH), index, a[0].T, a[1], ones[:RANK], ones)),
        (activation_forward, ("swiglu", x, x, a, chunks(activation_tile(x, a).rows), keys, 5)),
        (activation_gradient, ("swiglu", *wide, pieces.rows, sums, rank, 0, keys, 5, rank, RANK * WIDTH, SCALE)),
        (aggregate_rows, (torch.zeros(2, 50), torch.zeros(2), bank(), slots, torch.tensor([0, 1, 3]), table)),
        (sgd_rows, (bank(), bank(), bank(), bank().bfloat16(), slots, table, table, slots + 1, 0.9, 0.1, True)),
        (adamw_rows, (bank(), bank(), bank(), bank(), None, slots, table, table, slots + 1, 0.9, 0.9, 1e-8, 0.1, True)),
        (squared_norms_rows, (bank(), slots)),
        (head_product, (x, head, head_bias, rows, False)),
        (head_loss, (logits, labels, filled, 3)),
        (head_loss_backward, (logits, labels, torch.ones(ROWS), table, rows, x)),
        (head_grads, (x, logits, filled, torch.zeros_like(head), torch.zeros_like(head_bias))),
    ]  # fmt: skip


@pytest.mark.parametrize("number", range(len(_op_calls())))
def test_registered_ops_pass_torchs_own_checks(number):
    op, arguments = _op_calls()[number]
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


def test_every_registered_op_is_checked():
    names = {op._schema.name.removeprefix("fedra_kernels::") for op, _ in _op_calls()}
    assert names == set(torch.ops.fedra_kernels)


# Compiling takes seconds: each dropout and each frozen factor once.
@pytest.mark.parametrize(("dropout", "frozen"), [(None, ()), (0.3, ("grad_a",)), (None, ("grad_b",))])
def test_a_compiled_step_equals_an_eager_one(dropout, frozen):
    case = lora_case([20, 0, 33], inputs=32, outputs=32, dropout=dropout)
    groups, keys = case.groups, None if dropout is None else case.dropout.keys
    used = list(groups.host_slots)
    factors = [torch.randn(*shape) / 10 for shape in ((32, 4), (4, 32), (4,), (32,))]

    def step(x, grad_a, grad_b, param):
        drop = None if dropout is None else Dropout(dropout, keys)
        sinks = (None if "grad_a" in frozen else grad_a), (None if "grad_b" in frozen else grad_b)
        y = lora_linear(x, case.weight, case.bias, case.lora_a, case.lora_b, groups, SCALE, *sinks, drop)
        z = low_rank_add(y * 1.0, torch.arange(53), *factors)
        steps = torch.ones(3, dtype=torch.int64)
        ones = torch.ones(3)
        sgd(param, param * 0.5, None, torch.arange(3), ones, ones, steps, momentum=0.0, weight_decay=0.1)
        return z

    def run(function):
        x = case.x.detach().clone().requires_grad_()
        sinks = torch.zeros(case.lora_a.shape), torch.zeros(case.lora_b.shape)
        param = torch.ones(3, 40)
        out = function(x, *sinks, param)
        out.sum().backward()
        return {"out": out, "x": x.grad, "a": sinks[0][used], "b": sinks[1][used], "param": param}

    assert_close(run(torch.compile(step, backend="aot_eager")), run(step), 1e-6)


def test_the_ops_around_the_layers_compile_too():
    groups = RowGroups([12, 0, 8], torch.tensor([2, 1, 0]))
    weight, bias, labels = torch.randn(3, 5, WIDTH), torch.randn(3, 5), torch.arange(ROWS) % 5
    slots, rates, index = torch.arange(3), torch.ones(3), torch.arange(ROWS).flip(0)
    inputs = torch.randn(ROWS, WIDTH)

    def step(x, sinks, banks, sums):
        z = low_rank_add(x * 1.0, index[:7], weight[1].T, weight[1], bias[0], weight[0, 0])
        losses, correct = head_cross_entropy(z, weight, bias, labels, groups, *sinks[:2])
        logits = head_logits(z, weight, bias, groups, *sinks[2:])
        norms = squared_norms(banks[1], slots)
        adamw(
            *banks, slots, rates, rates, slots + 1,
            betas=(0.9, 0.9), eps=1e-8, weight_decay=0.1, zero_grad=True,
        )  # fmt: skip
        aggregate(*sums, banks[0], slots, slots, rates)
        mean = finish_aggregate(*sums, banks[0])
        return losses.sum() + logits.square().sum(), correct, norms, mean

    def run(function):
        x = inputs.clone().requires_grad_()
        sinks = [torch.zeros(bank.shape) for bank in (weight, bias) * 2]
        banks = [torch.full((3, 40), float(number + 1)) for number in range(4)]
        sums = [torch.zeros(3, 40), torch.zeros(3)]
        loss, *others = function(x, sinks, banks, sums)
        loss.backward()
        return dict(enumerate([loss, x.grad, *others, *sinks, *banks, *sums]))

    assert_close(run(torch.compile(step, backend="aot_eager")), run(step), 1e-6)


def test_a_block_between_compiled_parts_equals_an_eager_one():
    case = stream_case("llama", dtype=torch.float32)
    used = list(case.groups.host_slots)

    def step(x, gradients):
        total = stream_block(x * 1.0, case.index, case.block, case.attend, case.bank, gradients, case.groups)
        return total * 2.0

    def run(function):
        x, gradients = case.stream.clone().requires_grad_(), torch.zeros(case.bank.shape)
        out = function(x, gradients)
        out.backward(case.upstream)
        return {"out": out, "x": x.grad, "gradients": gradients[used]}

    assert_close(run(torch.compile(step, backend="aot_eager")), run(step), 1e-6)
