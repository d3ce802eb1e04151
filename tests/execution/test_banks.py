"""Rows of a bank are stepped as torch's own optimizers step parameters of their own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fedra_engine.config import TrainingConfig
from fedra_engine.execution.banks import Bank, BankOptions, bytes_per_parameter, clip_factors, loss_scale
from tests.tiny_federation import ADAMW, SGD

CPU = torch.device("cpu")
ROWS, SIZE, STEPS = 4, 6, 5
PLAIN = replace(SGD, momentum=0.0, weight_decay=0.0)


def filled(training: TrainingConfig, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Bank, Tensor]:
    """A bank whose rows hold the last rows of a source, in another order, and these."""
    torch.manual_seed(0)
    source = torch.randn(ROWS + 2, SIZE, dtype=dtype)
    bank = Bank(ROWS, BankOptions(SIZE, training, dtype, CPU, **options))
    chosen = torch.tensor([5, 2, 4, 3])
    bank.load(torch.tensor([1, 0, 3, 2]), source, chosen)
    return bank, source[torch.tensor([2, 5, 3, 4])]


def ones(count: int = ROWS) -> Tensor:
    return torch.ones(count, dtype=torch.float64)


@pytest.mark.parametrize("training", [PLAIN, SGD, ADAMW], ids=["sgd", "momentum and decay", "adamw"])
def test_steps_are_those_of_torch(training: TrainingConfig) -> None:
    bank, start = filled(training)
    assert torch.equal(bank.parameters, start)
    parameter = torch.nn.Parameter(start.clone())
    if training.optimizer == "sgd":
        momentum, decay = training.momentum, training.weight_decay
        expected: torch.optim.Optimizer = torch.optim.SGD([parameter], 0.1, momentum=momentum, weight_decay=decay)
    else:
        expected = torch.optim.AdamW(
            [parameter], 0.1, betas=training.betas, eps=training.eps, weight_decay=training.weight_decay
        )
    for step in range(1, STEPS + 1):
        gradient = torch.randn_like(start)
        bank.gradients += gradient
        parameter.grad = gradient
        bank.step(torch.arange(ROWS), lr=0.1, clip=ones(), steps=torch.full((ROWS,), step))
        expected.step()
        torch.testing.assert_close(bank.parameters, parameter.detach(), rtol=1e-12, atol=1e-12)
        assert not bank.gradients.any()


@pytest.mark.parametrize("training", [SGD, ADAMW], ids=["sgd", "adamw"])
def test_a_row_that_is_taken_over_starts_anew(training: TrainingConfig) -> None:
    bank, start = filled(training)
    fresh, _ = filled(training)
    gradient = torch.randn_like(start)
    for step in (1, 2):
        bank.gradients += gradient
        bank.step(torch.arange(ROWS), lr=0.1, clip=ones(), steps=torch.full((ROWS,), step))
    bank.load(torch.tensor([2]), start, torch.tensor([2]))
    for each in (bank, fresh):
        each.gradients[2] += gradient[2]
        each.step(torch.tensor([2]), lr=0.1, clip=ones(1), steps=torch.tensor([1]))
    assert torch.equal(bank.parameters[2], fresh.parameters[2])


def test_only_the_given_rows_and_columns_are_stepped() -> None:
    bank, start = filled(SGD, columns=slice(1, 4))
    bank.gradients += 1
    assert bank.squared_gradient_norms(torch.tensor([3, 0])).tolist() == pytest.approx([3, 3])
    bank.step(torch.tensor([3, 0]), lr=0.1, clip=ones(2), steps=torch.ones(2, dtype=torch.int64))
    changed = bank.parameters != start
    expected = torch.zeros_like(changed)
    expected[[0, 3], 1:4] = True
    assert torch.equal(changed, expected)


def test_gradients_are_multiplied_by_the_factor_of_their_row() -> None:
    bank, start = filled(PLAIN)
    bank.gradients += 1
    factors = torch.tensor([1.0, 0.5, 0.25, 0.0], dtype=torch.float64)
    bank.step(torch.arange(ROWS), lr=0.1, clip=factors, steps=torch.ones(ROWS, dtype=torch.int64))
    torch.testing.assert_close(start - bank.parameters, 0.1 * factors[:, None].expand(ROWS, SIZE))


@pytest.mark.parametrize("limit", [0.5, 100.0, None])
def test_factors_are_those_of_clip_grad_norm(limit: float | None) -> None:
    torch.manual_seed(0)
    gradients = torch.randn(ROWS, SIZE, dtype=torch.float64)
    found = clip_factors(gradients.square().sum(1), replace(SGD, clip_norm=limit), torch.float64)
    for gradient, factor in zip(gradients, found, strict=True):
        parameter = torch.nn.Parameter(torch.zeros(SIZE, dtype=torch.float64))
        parameter.grad = gradient.clone()
        if limit is not None:
            torch.nn.utils.clip_grad_norm_([parameter], limit)
        torch.testing.assert_close(factor * gradient, parameter.grad, rtol=1e-12, atol=0)


@pytest.mark.parametrize("square", [torch.inf, torch.nan])
def test_a_gradient_that_is_not_finite_has_no_factor(square: float) -> None:
    assert clip_factors(torch.tensor([square], dtype=torch.float64), SGD, torch.float32).isnan().all()


def test_gradients_of_rows_that_are_not_stepped_do_not_reach_the_next_client() -> None:
    bank, start = filled(SGD, all_stepped=False)
    bank.gradients += 1
    bank.load(torch.tensor([1]), start, torch.tensor([0]))
    assert not bank.gradients[1].any()
    assert bank.gradients[[0, 2, 3]].all()


def test_what_is_handed_out_may_be_adjusted_before_it_is_copied() -> None:
    bank, start = filled(SGD, torch.float32, compute_dtype=torch.bfloat16)
    assert torch.equal(bank.compute_copy, start.bfloat16())

    def adjust() -> None:
        bank.parameters[1] = 0

    bank.load(torch.tensor([1]), start, torch.tensor([0]), adjust)
    assert not bank.compute_copy[1].any()
    bank.gradients += 1
    bank.step(torch.arange(ROWS), lr=0.1, clip=ones().float(), steps=torch.ones(ROWS, dtype=torch.int64))
    assert torch.equal(bank.compute_copy, bank.parameters.bfloat16())


def test_bytes_of_a_parameter_count_gradients_moments_and_copies() -> None:
    float32, bfloat16 = torch.float32, torch.bfloat16
    assert bytes_per_parameter(PLAIN, float32, float32) == 2 * 4
    assert bytes_per_parameter(SGD, float32, float32) == 3 * 4
    assert bytes_per_parameter(ADAMW, float32, bfloat16) == 4 * 4 + 2
    assert bytes_per_parameter(replace(ADAMW, proximal_mu=0.1), float32, float32) == 5 * 4


def test_only_losses_of_float16_models_are_scaled() -> None:
    assert loss_scale(torch.float16) == 1024
    assert {loss_scale(dtype) for dtype in (torch.bfloat16, torch.float32, torch.float64)} == {1}
