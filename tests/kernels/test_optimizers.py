"""SGD and AdamW over slots against torch.optim, client by client."""

import math

import pytest
import torch

from fedra_kernels import (
    adamw,
    adamw_reference,
    sgd,
    sgd_reference,
    squared_changes,
    squared_changes_reference,
    squared_norms,
)
from fedra_kernels._kernels import optimizers
from fedra_kernels._kernels.checks import FLOAT_DTYPES

from .helpers import randn, relative_error

SLOTS = {"consecutive": [1, 2, 3], "scattered": [4, 0, 3]}
# The CPU adds squares in fp32 and squares the norm in fp64: up to 3.7e-7 off with any of 3,000 seeds.
FP32_NORMS = {"rtol": 1e-6, "atol": 0.0}
LR = torch.tensor([0.1, 0.02, 0.3], dtype=torch.float64)
CLIP = torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64)


def _torch_optimizer(make, param, grads):
    """Train one row alone for the given gradients."""
    leaf = param.clone().requires_grad_()
    optimizer = make([leaf])
    for grad in grads:
        leaf.grad = grad
        optimizer.step()
    return leaf.detach()


@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("size", [11, 70_000])
def test_sgd_equals_torch_optim_in_every_slot(slots, momentum, size):
    index = torch.tensor(SLOTS[slots])
    param = randn(5, size, seed=1)
    start = param.clone()
    # What others left in the buffer does not count.
    buffer = torch.full_like(param, math.nan) if momentum else None
    grads = [randn(5, size, seed=seed) for seed in (2, 3, 4)]
    for number, grad in enumerate(grads, start=1):
        step = torch.full((3,), number)
        sgd(param, grad, buffer, index, LR, CLIP, step, momentum=momentum, weight_decay=0.01)
    for row, slot in enumerate(SLOTS[slots]):
        expected = _torch_optimizer(
            lambda p, row=row: torch.optim.SGD(p, lr=float(LR[row]), momentum=momentum, weight_decay=0.01),
            start[slot],
            [grad[slot] * CLIP[row] for grad in grads],
        )
        assert relative_error(param[slot], expected) < 1e-12
    untouched = [slot for slot in range(5) if slot not in SLOTS[slots]]
    assert torch.equal(param[untouched], start[untouched])


@pytest.mark.parametrize("slots", SLOTS)
def test_adamw_equals_torch_optim_in_every_slot(slots):
    index = torch.tensor(SLOTS[slots])
    param = randn(5, 50_000, seed=1)
    # What others left in the moments does not count.
    start, mean, square = param.clone(), torch.full_like(param, math.nan), torch.full_like(param, math.nan)
    grads = [randn(5, 50_000, seed=seed) for seed in (2, 3, 4)]
    options = {"betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}
    for number, grad in enumerate(grads, start=1):
        step = torch.full((3,), number)
        adamw(param, grad, mean, square, index, LR, CLIP, step, **options)
    for row, slot in enumerate(SLOTS[slots]):
        expected = _torch_optimizer(
            lambda p, row=row: torch.optim.AdamW(p, lr=float(LR[row]), **options),
            start[slot],
            [grad[slot] * CLIP[row] for grad in grads],
        )
        assert relative_error(param[slot], expected) < 1e-11


def test_references_equal_the_ops():
    param, grad, mean = (randn(3, 20, seed=seed) for seed in (1, 2, 3))
    square, index, step = randn(3, 20, seed=4).square(), torch.arange(3), torch.tensor([1, 4, 9])
    expected = sgd_reference(param, grad, mean, LR, CLIP, step, momentum=0.9, weight_decay=0.1)
    found = [param.clone(), mean.clone()]
    sgd(found[0], grad, found[1], index, LR, CLIP, step, momentum=0.9, weight_decay=0.1)
    torch.testing.assert_close(found, list(expected))
    options = {"betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}
    expected = adamw_reference(param, grad, mean, square, LR, CLIP, step, **options)
    found = [param.clone(), mean.clone(), square.clone()]
    adamw(found[0], grad, found[1], found[2], index, LR, CLIP, step, **options)
    torch.testing.assert_close(found, list(expected))


OPTIONS = {"betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}
STEP = torch.tensor([1, 4, 9])


def _banks(dtypes, size=300):
    """param, grad, mean, square [5, size]."""
    banks = [randn(5, size, seed=seed) for seed in range(4)]
    banks[3].square_()
    return [bank.to(dtype) for bank, dtype in zip(banks, dtypes, strict=True)]


def _sgd(banks, index, **options):
    dtype = torch.float64 if banks[0].dtype == torch.float64 else torch.float32
    sgd(*banks[:3], index, LR.to(dtype), CLIP.to(dtype), STEP, momentum=0.9, weight_decay=0.1, **options)


def _adamw(banks, index, **options):
    dtype = torch.float64 if banks[0].dtype == torch.float64 else torch.float32
    adamw(*banks, index, LR.to(dtype), CLIP.to(dtype), STEP, **OPTIONS, **options)


STEPS = pytest.mark.parametrize("step", [_sgd, _adamw])


@STEPS
@pytest.mark.parametrize("slots", SLOTS)
def test_zero_grad_clears_the_gradients_it_used_and_no_others(slots, step):
    index = torch.tensor(SLOTS[slots])
    kept, cleared = _banks([torch.float64] * 4), _banks([torch.float64] * 4)
    step(kept, index)
    step(cleared, index, zero_grad=True)
    gradient = _banks([torch.float64] * 4)[1]
    assert torch.equal(kept[1], gradient)
    gradient[index] = 0.0
    assert torch.equal(cleared[1], gradient)
    for number in (0, 2, 3):
        assert torch.equal(cleared[number], kept[number])


@STEPS
@pytest.mark.parametrize("zero_grad", [False, True])
@pytest.mark.parametrize("slots", SLOTS)
def test_columns_of_wider_banks_are_stepped_alone(slots, zero_grad, step):
    index, columns = torch.tensor(SLOTS[slots]), slice(40, 240)
    whole, before = _banks([torch.float64] * 4), _banks([torch.float64] * 4)
    # Moments as narrow as the columns, as an executor keeps them.
    narrow = [whole[0][:, columns], whole[1][:, columns], *(bank[:, columns].clone() for bank in whole[2:])]
    expected = [bank[:, columns].clone() for bank in before]
    step(narrow, index, zero_grad=zero_grad)
    step(expected, index, zero_grad=zero_grad)
    torch.testing.assert_close(narrow, expected, rtol=1e-13, atol=0.0)
    for bank, old in zip(whole[:2], before[:2], strict=True):
        assert torch.equal(bank[:, :40], old[:, :40])
        assert torch.equal(bank[:, 240:], old[:, 240:])


@STEPS
@pytest.mark.parametrize("zero_grad", [False, True])
@pytest.mark.parametrize(
    ("param", "state"),
    [(torch.bfloat16, torch.bfloat16)] + [(dtype, torch.float32) for dtype in FLOAT_DTYPES],
    ids=str,
)
def test_banks_of_several_dtypes(param, state, step, zero_grad):
    index = torch.tensor([4, 0, 3])
    banks, shadow = _banks([param, state, state, state]), torch.zeros(5, 300, dtype=torch.bfloat16)
    wide = [bank[index].double() for bank in banks]
    if step is _sgd:
        expected = sgd_reference(*wide[:3], LR, CLIP, STEP, momentum=0.9, weight_decay=0.1)
    else:
        expected = adamw_reference(*wide, LR, CLIP, STEP, **OPTIONS)
    step(banks, index, shadow=shadow, zero_grad=zero_grad)
    for bank, want in zip((banks[0], *banks[2:]), expected, strict=False):
        assert relative_error(bank[index], want) < {torch.bfloat16: 4e-3, torch.float16: 5e-4}.get(bank.dtype, 1e-6)
    assert relative_error(shadow[index], expected[0]) < 4e-3
    assert (shadow[[1, 2]] == 0).all()
    assert (banks[1][index] == 0).all() == zero_grad


@STEPS
def test_clients_at_other_rates_and_steps_share_a_launch(step, monkeypatch):
    """Cut into batches of one row, or in one: the same numbers."""
    banks = _banks([torch.float64] * 4)
    step(banks, torch.tensor([1, 2, 3]))
    monkeypatch.setattr(optimizers, "_BATCH_ENTRIES", 300)
    again = _banks([torch.float64] * 4)
    step(again, torch.tensor([1, 2, 3]))
    torch.testing.assert_close(again, banks, rtol=1e-13, atol=0.0)


def test_no_slots_change_nothing():
    banks = _banks([torch.float64] * 4)
    none, empty = torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.float64)
    sgd(*banks[:3], none, empty, empty, none, momentum=0.9, weight_decay=0.1)
    adamw(*banks, none, empty, empty, none, **OPTIONS)
    assert squared_norms(banks[1], none).shape == (0,)
    assert all(torch.equal(bank, old) for bank, old in zip(banks, _banks([torch.float64] * 4), strict=True))


@pytest.mark.parametrize("columns", [slice(None), slice(7, 40_000)], ids=["all", "some columns"])
@pytest.mark.parametrize("slots", [[1, 2, 3], [4, 0, 3], [29, 0]], ids=str)
def test_squared_norms_equal_the_sum_of_squares(slots, columns):
    grad = randn(30, 50_000, seed=1)[:, columns]
    found = squared_norms(grad, torch.tensor(slots))
    torch.testing.assert_close(found, grad[slots].double().square().sum(1), **FP32_NORMS)


def test_squares_that_overflow_have_a_finite_sum():
    grad = torch.randn(4, 3000) * 1e30
    grad[1, 5], grad[2, 7], grad[3] = torch.nan, torch.inf, torch.randn(3000)
    for slots in (torch.arange(4), torch.tensor([3, 0])):
        expected = grad[slots].double().square().sum(1)
        torch.testing.assert_close(squared_norms(grad, slots), expected, equal_nan=True, **FP32_NORMS)


@pytest.mark.parametrize("width", [40, 50_000])
@pytest.mark.parametrize("slots", [[1, 2, 3], [4, 0, 3], [29, 0], []], ids=str)
def test_squared_changes_equal_the_sum_of_squared_differences(slots, width):
    after, before, slots = randn(30, width, seed=1), randn(5, width, seed=2), torch.tensor(slots, dtype=torch.int64)
    rows = slots % 5
    expected = squared_changes_reference(after, slots, before, rows)
    found = [squared_changes(after, slots, before, rows), squared_changes(after, slots, before[rows])]
    for each in found:
        torch.testing.assert_close(each, expected, **FP32_NORMS)


def test_changes_whose_squares_overflow_have_a_finite_sum():
    after, before = torch.randn(4, 3000) * 1e30, torch.randn(2, 3000)
    after[1, 5], after[2, 7], after[3] = torch.nan, torch.inf, torch.randn(3000)
    slots, rows = torch.tensor([3, 0, 1, 2]), torch.tensor([1, 0, 1, 0])
    expected = squared_changes_reference(after, slots, before, rows)
    for each in (squared_changes(after, slots, before, rows), squared_changes(after, slots, before[rows])):
        torch.testing.assert_close(each, expected, equal_nan=True, **FP32_NORMS)


def test_bad_arguments_are_named():
    param, index = randn(5, 4, seed=1), torch.tensor([1, 2, 3])
    with pytest.raises(ValueError, match=r"^slots: found 5"):
        sgd(param, param, None, index + 2, LR, CLIP, STEP, momentum=0.0, weight_decay=0.0)
    with pytest.raises(ValueError, match=r"^momentum_buffer: found None"):
        sgd(param, param, None, index, LR, CLIP, STEP, momentum=0.9, weight_decay=0.0)
    with pytest.raises(ValueError, match=r"^lr: found shape"):
        sgd(param, param, None, index, LR[:2], CLIP, STEP, momentum=0.0, weight_decay=0.0)
    with pytest.raises(ValueError, match=r"^step: found dtype"):
        adamw(param, param, param, param, index, LR, CLIP, LR, betas=(0.9, 0.9), eps=1e-8, weight_decay=0.0)
