"""Every kernel of lora_linear against the float64 reference."""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ..cases import TOLERANCE, assert_close, lora_case

# The interpreter's tiles have 32 rows: groups that fill, split, share and straddle them, or are empty.
SIZES = {
    "one row": [1],
    "straddling": [20, 30, 40],
    "ragged": [33, 0, 1, 1, 64, 0, 5],
    "many small": [3] * 14,
    "empty": [0, 0],
    "no group": [],
}


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_values_and_gradients_equal_the_reference(sizes, dtype):
    case = lora_case(SIZES[sizes], dtype=dtype)
    assert_close(case.run(), case.expected(), TOLERANCE[dtype])


@pytest.mark.parametrize("ranks", [(1,), (4, 16, 1), (64, 3, 8), (128, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ranks_of_one_launch_may_differ(ranks, dtype):
    case = lora_case([20, 3, 30], ranks=ranks, dtype=dtype)
    found = case.run()
    assert_close(found, case.expected(), TOLERANCE[dtype])
    for group, rank in enumerate(case.ranks):
        assert (found["grad_a"][group, rank:] == 0).all()
        assert (found["grad_b"][group, :, rank:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ranks", [(8,), (40,)], ids=str)
def test_dropout_equals_the_reference(dtype, ranks):
    case = lora_case([20, 0, 33], ranks=ranks, dtype=dtype, dropout=0.3)
    assert_close(case.run(), case.expected(), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ranks", [(8,), (40,)], ids=str)
@pytest.mark.parametrize("dropout", [None, 0.3])
def test_without_a_weight_the_low_rank_product_is_all(dropout, ranks, dtype):
    case = lora_case([20, 0, 33], ranks=ranks, dtype=dtype, dropout=dropout, weight=False)
    assert_close(case.run(), case.expected(), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ranks", [(8,), (40,)], ids=str)
@pytest.mark.parametrize("grad_x", [False, True])
@pytest.mark.parametrize("frozen", [("grad_a",), ("grad_b",), ("grad_a", "grad_b")])
def test_a_frozen_factor_has_no_gradient(frozen, grad_x, ranks, dtype):
    case = lora_case([20, 0, 33], ranks=ranks, dtype=dtype, dropout=0.3)
    found, expected = case.run(frozen=frozen, grad_x=grad_x), case.expected()
    assert set(found) == set(expected) - set(frozen) - (set() if grad_x else {"grad_x"})
    assert_close(found, {name: expected[name] for name in found}, TOLERANCE[dtype])


def test_layers_wider_than_the_single_pass_equal_the_reference(monkeypatch):
    monkeypatch.setattr(importlib.import_module("fedra_kernels.lora_linear"), "SINGLE_PASS_OUTPUTS", 8)
    case = lora_case([20, 0, 33])
    assert_close(case.run(), case.expected(), TOLERANCE[torch.float32])


@settings(max_examples=15)
@given(
    sizes=st.lists(st.one_of(st.just(0), st.integers(1, 5), st.integers(28, 70)), max_size=6),
    inputs=st.sampled_from([16, 32, 50]),
    outputs=st.sampled_from([3, 32, 70]),
    ranks=st.lists(st.integers(1, 20), min_size=1, max_size=3),
    dropout=st.sampled_from([None, 0.5]),
    bias=st.booleans(),
)
def test_drawn_problems_equal_the_reference(sizes, inputs, outputs, ranks, dropout, bias):
    case = lora_case(sizes, inputs=inputs, outputs=outputs, ranks=ranks, dropout=dropout, bias=bias)
    assert_close(case.run(), case.expected(), TOLERANCE[torch.float32])


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
@pytest.mark.parametrize("factor", ["lora_a", "lora_b"])
@pytest.mark.parametrize("dropout", [None, 0.3])
def test_a_client_that_diverged_harms_nobody_else(wrong, factor, dropout):
    healthy = lora_case([13, 20, 9], slots=[5, 3, 1], dropout=dropout).run()
    case = lora_case([13, 20, 9], slots=[5, 3, 1], dropout=dropout)
    getattr(case, factor)[3, 2, 1] = wrong
    found = case.run()
    for name in ("y", "grad_x"):
        for rows in (slice(0, 13), slice(33, 42)):
            assert torch.equal(found[name][rows], healthy[name][rows])
    for name in ("grad_a", "grad_b"):
        for group in (0, 2):
            assert torch.equal(found[name][group], healthy[name][group])
    assert not found["y"][13:33].isfinite().all()
