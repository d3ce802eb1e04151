"""Frozen Linears: the products in every precision, and weights that change."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fedra_kernels import FrozenLinear, frozen_linear

TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
ROWS = [7, 700]
"""The second makes products that oneDNN computes in float32, too."""


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found.double() - expected).abs().max() <= TOLERANCES[found.dtype] * expected.abs().max())


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("input_first", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_both_products(dtype: torch.dtype, has_bias: bool, input_first: bool, rows: int) -> None:
    rng = torch.Generator().manual_seed(0)
    x, grad, residual = (torch.randn(rows, n, generator=rng).to(dtype) for n in (96, 80, 80))
    other = torch.randn(rows, 96, generator=rng).to(dtype)
    weight = torch.randn(80, 96, generator=rng).to(dtype)
    bias = torch.randn(80, generator=rng).to(dtype) if has_bias else None
    linear = FrozenLinear(weight.T.contiguous() if input_first else weight, bias, input_first=input_first)
    y = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    assert close(linear.forward(x), y)
    assert close(linear.forward(x, residual), y + residual.double())
    grad_x = grad.double() @ weight.double()
    assert close(linear.backward(grad), grad_x)
    assert close(linear.backward(grad, other.clone()), grad_x + other.double())


def test_where_onednn_refuses_bfloat16_torch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor without AVX-512."""
    monkeypatch.setattr(frozen_linear, "_HAS_BFLOAT16", False)
    monkeypatch.setattr(frozen_linear, "F", SimpleNamespace(linear=lambda x, weight, bias: x @ weight.T + 1))
    weight = torch.eye(4, dtype=torch.bfloat16)
    assert FrozenLinear(weight, None).forward(weight).tolist() == (weight + 1).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_weight_that_changed_is_used(dtype: torch.dtype) -> None:
    weight = torch.nn.Parameter(torch.ones(128, 128, dtype=dtype), requires_grad=False)
    linear, x = FrozenLinear(weight, None), torch.ones(512, 128, dtype=dtype)
    assert linear.forward(x).unique().tolist() == [128.0]
    weight.detach().fill_(2.0)
    assert linear.forward(x).unique().tolist() == [256.0]
    assert linear.backward(x).unique().tolist() == [256.0]
