"""The ops that make S for the next layer, alone and composed into an MLP branch, on the torch path."""

import pytest
import torch

from fedra_kernels import Dropout, gather_norm, gather_norm_reference, gelu, lora_linear, swiglu
from fedra_kernels.activation import activation_reference

from .blocks import mlp_branch
from .cases import assert_close, lora_case
from .helpers import SCALE, randn

INDEX = torch.tensor([4, 0, 3])


@pytest.mark.parametrize("dropout", [None, 0.3])
def test_a_fused_branch_equals_plain_torch(dropout):
    branch = mlp_branch(torch.float32, dropout)
    assert_close(branch.run_fused(), branch.run_plain(), 1e-5)


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_gather_norm_equals_the_reference(kind):
    hidden, weight = randn(6, 8, seed=1).requires_grad_(), randn(8, seed=2)
    bias = randn(8, seed=3) if kind == "layer" else None
    x, shrunk = gather_norm(hidden, INDEX, weight, bias, kind=kind, eps=1e-6)
    expected = gather_norm_reference(hidden, INDEX, weight, bias, kind=kind, eps=1e-6)
    assert shrunk == ()
    torch.testing.assert_close(x, expected)
    upstream = randn(3, 8, seed=4)
    (found,), (want,) = (torch.autograd.grad(y, hidden, upstream) for y in (x, expected))
    torch.testing.assert_close(found, want)


@pytest.mark.parametrize("kind", ["gelu", "gelu_tanh", "swiglu"])
def test_activations_equal_the_reference(kind):
    x, up = randn(2, 3, 8, seed=1), randn(2, 3, 8, seed=2)
    if kind == "swiglu":
        y, _ = swiglu(x, up)
    else:
        y, _ = gelu(x, approximate="none" if kind == "gelu" else "tanh")
    torch.testing.assert_close(y, activation_reference(kind, x, up if kind == "swiglu" else None))


@pytest.mark.parametrize("dropout", [None, 0.3])
def test_the_given_shrink_is_the_ops_own(dropout):
    case = lora_case([20, 0, 33], dropout=dropout)
    y, shrunk = gelu(case.x, lora_a=case.lora_a, groups=case.groups, dropout=case.dropout)
    sinks = torch.zeros(case.lora_a.shape), torch.zeros(case.lora_b.shape)
    arguments = (y, case.weight, case.bias, case.lora_a, case.lora_b, case.groups, SCALE, *sinks, case.dropout)
    torch.testing.assert_close(lora_linear(*arguments, shrunk=shrunk), lora_linear(*arguments))


def _norm(**changes):
    case = lora_case([2, 1], inputs=8)
    arguments = {
        "hidden": randn(6, 8, seed=1, dtype=torch.float32), "index": INDEX, "weight": torch.ones(8),
        "bias": None, "kind": "rms", "eps": 1e-6, "lora_a": [case.lora_a], "groups": case.groups,
    }  # fmt: skip
    return gather_norm(**(arguments | changes))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("hidden", {"hidden": torch.ones(8, 6).T}),
        ("index", {"index": torch.tensor([0, 1, 6])}),
        ("weight", {"weight": torch.ones(7)}),
        ("bias", {"bias": torch.ones(8)}),
        ("kind", {"kind": "batch"}),
        ("groups", {"groups": None}),
        ("groups", {"index": torch.tensor([0, 1])}),
        ("lora_a", {"lora_a": [torch.ones(4, 8, 7)]}),
        ("lora_a", {"lora_a": [torch.ones(5, 129, 8)]}),
        ("lora_a", {"lora_a": [torch.ones(5, 4, 8)] * 4}),
        ("dropout", {"dropout": [Dropout(0.1, torch.arange(2))] * 2}),
        ("dropout.keys", {"dropout": [Dropout(0.1, torch.arange(3))]}),
    ],
)
def test_bad_arguments_of_gather_norm_are_named(name, changes):
    with pytest.raises(ValueError, match=f"^{name}: found .*expected"):
        _norm(**changes)


def test_bad_arguments_of_the_activations_are_named():
    x = torch.ones(3, 8)
    with pytest.raises(ValueError, match=r"^approximate: found 'exact', expected"):
        gelu(x, approximate="exact")
    with pytest.raises(ValueError, match=r"^up: found shape"):
        swiglu(x, x[:2])
    with pytest.raises(ValueError, match=r"^groups: found None, expected"):
        gelu(x, lora_a=torch.ones(2, 4, 8))
