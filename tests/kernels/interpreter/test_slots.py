"""The ops over bank slots and the head against their float64 references."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedra_kernels import (
    RowGroups,
    adamw,
    adamw_reference,
    aggregate,
    aggregate_reference,
    head_cross_entropy,
    head_cross_entropy_reference,
    head_logits,
    head_logits_reference,
    sgd,
    sgd_reference,
    squared_norms,
    squared_norms_reference,
)

from ..cases import TOLERANCE, assert_close, surrounded
from ..helpers import randn

DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
LR, CLIP = torch.tensor([0.1, 0.02, 0.3]), torch.tensor([1.0, 0.5, 0.25])
SLOTS = torch.tensor([4, 0, 3])
SIZES = [7, 1024, 2500]


def _bank(seed, size, dtype=torch.float32, used=SLOTS):
    """[6, size], some columns of a wider bank; unused rows and the columns beside are NaN."""
    bank = torch.full((6, size + 5), float("nan"), dtype=dtype)[:, 3 : 3 + size]
    bank[used] = randn(len(used), size, seed=seed, dtype=torch.float32).to(dtype)
    return bank


def _untouched(*banks):
    """The rows of other slots and the columns beside are still NaN."""
    return all(
        bank[[1, 2, 5]].isnan().all() and bank._base[:, :3].isnan().all() and bank._base[:, -2:].isnan().all()
        for bank in banks
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("steps", [(1, 1, 1), (2, 900, 1)], ids=str)
@pytest.mark.parametrize("zero_grad", [False, True])
@DTYPES
def test_sgd_equals_its_reference(size, momentum, steps, zero_grad, dtype):
    step = torch.tensor(steps)
    param, grad = _bank(1, size, dtype), _bank(2, size)
    buffer, shadow = (_bank(3, size) if momentum else None), _bank(4, size, torch.bfloat16)
    zeros, gradient = torch.zeros(3, size, dtype=torch.float64), grad[SLOTS]
    expected = sgd_reference(
        param[SLOTS].double(), gradient.double(), zeros if buffer is None else buffer[SLOTS].double(),
        LR.double(), CLIP.double(), step, momentum=momentum, weight_decay=0.1,
    )  # fmt: skip
    options = {"momentum": momentum, "weight_decay": 0.1, "shadow": shadow, "zero_grad": zero_grad}
    sgd(param, grad, buffer, SLOTS, LR, CLIP, step, **options)
    assert_close({"param": param[SLOTS]}, {"param": expected[0]}, TOLERANCE[dtype])
    assert_close({"shadow": shadow[SLOTS]}, {"shadow": expected[0]}, TOLERANCE[torch.bfloat16])
    assert torch.equal(grad[SLOTS], torch.zeros(3, size) if zero_grad else gradient)
    assert _untouched(param, grad, shadow)
    if buffer is not None:
        assert_close({"buffer": buffer[SLOTS]}, {"buffer": expected[1]}, 1e-5)
        assert _untouched(buffer)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("steps", [(1, 1, 1), (2, 900, 1)], ids=str)
@pytest.mark.parametrize("zero_grad", [False, True])
@DTYPES
def test_adamw_equals_its_reference(size, steps, zero_grad, dtype):
    param, grad, mean, square = _bank(1, size, dtype), _bank(2, size), _bank(3, size), _bank(4, size).square_()
    shadow, step = _bank(5, size, torch.float16), torch.tensor(steps)
    options = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
    gradient, wide = grad[SLOTS], [bank[SLOTS].double() for bank in (param, grad, mean, square)]
    expected = adamw_reference(*wide, LR.double(), CLIP.double(), step, **options)
    adamw(param, grad, mean, square, SLOTS, LR, CLIP, step, shadow=shadow, zero_grad=zero_grad, **options)
    assert_close({"param": param[SLOTS]}, {"param": expected[0]}, TOLERANCE[dtype])
    found = {"mean": mean[SLOTS], "square": square[SLOTS]}
    assert_close(found, {"mean": expected[1], "square": expected[2]}, 1e-5)
    assert_close({"shadow": shadow[SLOTS]}, {"shadow": expected[0]}, TOLERANCE[torch.float16])
    assert torch.equal(grad[SLOTS], torch.zeros(3, size) if zero_grad else gradient)
    assert _untouched(param, grad, mean, square, shadow)


@pytest.mark.parametrize("size", [*SIZES, 4100])
@DTYPES
def test_squared_norms_equal_their_reference(size, dtype):
    grad = _bank(1, size, dtype)
    expected = squared_norms_reference(grad.double(), SLOTS)
    assert_close({"norms": squared_norms(grad, SLOTS)}, {"norms": expected}, 1e-5)


def test_squares_that_overflow_have_a_finite_sum():
    grad = _bank(1, 100, torch.float32) * 1e30
    found, expected = squared_norms(grad, SLOTS), squared_norms_reference(grad, SLOTS)
    assert found.isfinite().all()
    assert_close({"norms": found}, {"norms": expected}, 1e-5)


@pytest.mark.parametrize("accumulator", [torch.float32, torch.float64], ids=str)
@DTYPES
def test_aggregate_sums_each_blocks_holders(accumulator, dtype):
    used = torch.tensor([5, 2, 0, 3])
    values, blocks = _bank(1, 2500, dtype, used), torch.tensor([1, 3, 1, 0])
    weights = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=accumulator)
    numerator = randn(5, 2500, seed=2, dtype=accumulator)
    numerator[4] = float("nan")
    denominator = torch.tensor([1.0, 2.0, 0.0, 1.0, float("nan")], dtype=accumulator)
    expected = aggregate_reference(
        numerator.double(), denominator.double(), values.double(), used, blocks, weights.double()
    )
    aggregate(numerator, denominator, values, used, blocks, weights)
    held = [0, 1, 2, 3]
    assert_close({"sum": numerator[held]}, {"sum": expected[0][held]}, 1e-5)
    assert_close({"weight": denominator[held]}, {"weight": expected[1][held]}, 1e-6)
    assert numerator[4].isnan().all()


def test_aggregate_sums_fp64_values_in_fp64():
    """They are what deterministic aggregation sums; rounded to fp32 they would be off by 1e-8."""
    used, blocks = torch.tensor([5, 2, 0, 3]), torch.tensor([1, 3, 1, 0])
    values = _bank(1, 2500, torch.float64, used)
    values[used] += 1e-12 * randn(4, 2500, seed=3)
    weights = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64)
    sums, totals = torch.zeros(5, 2500, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    expected = aggregate_reference(sums, totals, values, used, blocks, weights)
    aggregate(sums, totals, values, used, blocks, weights)
    assert_close({"sum": sums, "weight": totals}, {"sum": expected[0], "weight": expected[1]}, 1e-15)


@settings(max_examples=15)
@given(pairs=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), max_size=8), seed=st.integers(0, 99))
def test_aggregate_keeps_the_given_order(pairs, seed):
    values = randn(6, 40, seed=seed, dtype=torch.float32)
    slots, blocks = (torch.tensor([pair[i] for pair in pairs], dtype=torch.int64) for i in (0, 1))
    weights = randn(len(pairs), seed=seed + 1, dtype=torch.float32)
    sums, totals = torch.zeros(4, 40), torch.zeros(4)
    expected = aggregate_reference(sums, totals, values, slots, blocks, weights)
    aggregate(sums, totals, values, slots, blocks, weights)
    assert torch.equal(sums, expected[0])
    assert torch.equal(totals, expected[1])


def _head(sizes, classes, dtype, slots=None):
    """Inputs whose numbers depend on the slot alone."""
    slots = list(range(1, len(sizes) + 1)) if slots is None else slots
    size = max(slots, default=0) + 2
    weight = torch.full((size, classes, 24), float("nan"), dtype=dtype)
    bias = torch.full((size, classes), float("nan"), dtype=dtype)
    features, labels = [torch.empty(0, 24)], [torch.empty(0, dtype=torch.int64)]
    for count, slot in zip(sizes, slots, strict=True):
        weight[slot] = randn(classes, 24, seed=slot, dtype=torch.float32).to(dtype)
        bias[slot] = randn(classes, seed=100 + slot, dtype=torch.float32).to(dtype)
        features.append(randn(count, 24, seed=200 + slot, dtype=torch.float32))
        labels.append(torch.randint(classes, (count,), generator=torch.Generator().manual_seed(slot)))
    groups = RowGroups(sizes, torch.tensor(slots, dtype=torch.int64))
    return surrounded(torch.cat(features).to(dtype)), weight, bias, surrounded(torch.cat(labels)), groups


def _sinks(weight, bias, used):
    """Zeros in the slots in use, NaN in all others."""
    sinks = [torch.full(bank.shape, float("nan")) for bank in (weight, bias)]
    for sink in sinks:
        sink[used] = 0.0
    return sinks


def _run_head(features, weight, bias, labels, groups):
    used = list(groups.host_slots)
    sinks = _sinks(weight, bias, used)
    features = features.detach().requires_grad_()
    losses, correct = head_cross_entropy(features, weight, bias, labels, groups, *sinks)
    losses.backward(torch.linspace(0.5, 1.5, len(groups)))
    return {
        "losses": losses.detach(), "features": features.grad,
        "weight": sinks[0][used], "bias": sinks[1][used], "correct": correct,
    }  # fmt: skip


def _assert_head(sizes, classes, dtype):
    features, weight, bias, labels, groups = _head(sizes, classes, dtype)
    found = _run_head(features, weight, bias, labels, groups)
    wide = [tensor.double().requires_grad_() for tensor in (features, weight, bias)]
    losses, correct = head_cross_entropy_reference(*wide, labels, groups)
    upstream = torch.linspace(0.5, 1.5, len(groups)).double()
    grads = torch.autograd.grad(losses, wide, upstream)
    used = list(groups.host_slots)
    expected = {
        "losses": losses, "features": grads[0], "weight": grads[1][used], "bias": grads[2][used]
    }  # fmt: skip
    assert torch.equal(found.pop("correct"), correct)
    assert_close(found, expected, TOLERANCE[dtype])


def _assert_head_logits(sizes, classes, dtype):
    features, weight, bias, _, groups = _head(sizes, classes, dtype)
    used = list(groups.host_slots)
    sinks, leaf = _sinks(weight, bias, used), features.detach().requires_grad_()
    logits = head_logits(leaf, weight, bias, groups, *sinks)
    upstream = surrounded(randn(*logits.shape, seed=9, dtype=logits.dtype))
    logits.backward(upstream)
    wide = [tensor.double().requires_grad_() for tensor in (features, weight, bias)]
    expected = head_logits_reference(*wide, groups)
    grads = torch.autograd.grad(expected, wide, upstream.double())
    assert_close(
        {"logits": logits, "features": leaf.grad, "weight": sinks[0][used], "bias": sinks[1][used]},
        {"logits": expected, "features": grads[0], "weight": grads[1][used], "bias": grads[2][used]},
        TOLERANCE[dtype],
    )


HEADS = pytest.mark.parametrize("check", [_assert_head, _assert_head_logits])


@HEADS
@DTYPES
@pytest.mark.parametrize("classes", [2, 10, 130])
@pytest.mark.parametrize("sizes", [[1], [5, 0, 20, 1]], ids=str)
def test_heads_equal_their_references(check, dtype, classes, sizes):
    check(sizes, classes, dtype)


@HEADS
@settings(max_examples=8)
@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=5), classes=st.integers(2, 40))
def test_heads_of_drawn_groups_equal_their_references(check, sizes, classes):
    check(sizes, classes, torch.float32)


def test_the_first_of_equal_logits_is_the_answer():
    groups = RowGroups([4], torch.tensor([0]))
    zeros = torch.zeros(1, 3, 8), torch.zeros(1, 3)
    labels = torch.tensor([0, 1, 2, 0])
    _, correct = head_cross_entropy(torch.ones(4, 8), *zeros, labels, groups, *(z.clone() for z in zeros))
    assert correct.tolist() == [2]
