"""SGD and AdamW over slots against torch.optim, client by client."""

import pytest
import torch

from fedra_kernels import adamw, adamw_reference, sgd, sgd_reference, squared_norms

from .helpers import randn, relative_error

SLOTS = {"consecutive": [1, 2, 3], "scattered": [4, 0, 3]}
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
    buffer = torch.zeros_like(param) if momentum else None
    grads = [randn(5, size, seed=seed) for seed in (2, 3, 4)]
    for grad in grads:
        sgd(param, grad, buffer, index, LR, CLIP, momentum=momentum, weight_decay=0.01)
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
    start, mean, square = param.clone(), torch.zeros_like(param), torch.zeros_like(param)
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
    expected = sgd_reference(param, grad, mean, LR, CLIP, momentum=0.9, weight_decay=0.1)
    found = [param.clone(), mean.clone()]
    sgd(found[0], grad, found[1], index, LR, CLIP, momentum=0.9, weight_decay=0.1)
    torch.testing.assert_close(found, list(expected))
    options = {"betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}
    expected = adamw_reference(param, grad, mean, square, LR, CLIP, step, **options)
    found = [param.clone(), mean.clone(), square.clone()]
    adamw(found[0], grad, found[1], found[2], index, LR, CLIP, step, **options)
    torch.testing.assert_close(found, list(expected))


@pytest.mark.parametrize("slots", SLOTS)
def test_squared_norms_equal_the_sum_of_squares(slots):
    grad = randn(5, 70_000, seed=1)
    found = squared_norms(grad, torch.tensor(SLOTS[slots]))
    torch.testing.assert_close(found, grad[SLOTS[slots]].square().sum(1))


def test_bad_arguments_are_named():
    param, index = randn(5, 4, seed=1), torch.tensor([1, 2, 3])
    with pytest.raises(ValueError, match=r"^slots: found 5"):
        sgd(param, param, None, index + 2, LR, CLIP, momentum=0.0, weight_decay=0.0)
    with pytest.raises(ValueError, match=r"^momentum_buffer: found None"):
        sgd(param, param, None, index, LR, CLIP, momentum=0.9, weight_decay=0.0)
    with pytest.raises(ValueError, match=r"^lr: found shape"):
        sgd(param, param, None, index, LR[:2], CLIP, momentum=0.0, weight_decay=0.0)
    with pytest.raises(ValueError, match=r"^step: found dtype"):
        adamw(param, param, param, param, index, LR, CLIP, LR, betas=(0.9, 0.9), eps=1e-8, weight_decay=0.0)
