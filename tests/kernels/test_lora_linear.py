"""lora_linear on the CPU's torch path against autograd through the reference, in float64."""

import pytest
import torch

from fedra_kernels import Dropout, dropout_key, lora_linear, lora_linear_reference

from .cases import assert_close, lora_case
from .helpers import SCALE, make_groups, randn, relative_error

SLOTS, RANK, INPUTS, OUTPUTS = 7, 4, 12, 10
GROUPS = {
    "equal": ([3, 3, 3], [2, 3, 4]),
    "ragged": ([3, 0, 1, 1, 5], [6, 0, 2, 4, 1]),
    "empty": ([0, 0], [1, 0]),
    "one": ([4], [5]),
}


def _bank(seed, dtype=torch.float64):
    """A and B as views into one bank, as the engine stores them."""
    per_slot = RANK * INPUTS + OUTPUTS * RANK + 5
    bank = randn(SLOTS, per_slot, seed=seed, dtype=dtype)
    a = bank[:, : RANK * INPUTS].view(SLOTS, RANK, INPUTS)
    b = bank[:, RANK * INPUTS : RANK * (INPUTS + OUTPUTS)].view(SLOTS, OUTPUTS, RANK)
    return bank, a, b


def _dropout(groups):
    return Dropout(0.4, torch.tensor([dropout_key(3, slot) for slot in groups.host_slots]))


@pytest.mark.parametrize("shape", GROUPS)
@pytest.mark.parametrize("with_dropout", [False, True])
def test_values_and_gradients_equal_autograd(shape, with_dropout):
    groups = make_groups(*GROUPS[shape])
    x = randn(groups.rows, INPUTS, seed=1).requires_grad_()
    weight, bias = randn(OUTPUTS, INPUTS, seed=2), randn(OUTPUTS, seed=3)
    _, a, b = _bank(4)
    _, grad_a, grad_b = _bank(5)
    before_a, before_b = grad_a.clone(), grad_b.clone()
    dropout = _dropout(groups) if with_dropout else None
    upstream = randn(groups.rows, OUTPUTS, seed=6)
    y = lora_linear(x, weight, bias, a, b, groups, SCALE, grad_a, grad_b, dropout)
    y.backward(upstream)

    leaves = [x.detach().clone().requires_grad_(), a.clone().requires_grad_(), b.clone().requires_grad_()]
    expected = lora_linear_reference(leaves[0], weight, bias, leaves[1], leaves[2], groups, SCALE, dropout)
    assert relative_error(y, expected) < 1e-12
    if groups.rows:
        expected.backward(upstream)
        assert relative_error(x.grad, leaves[0].grad) < 1e-12
        assert relative_error(grad_a - before_a, leaves[1].grad) < 1e-12
        assert relative_error(grad_b - before_b, leaves[2].grad) < 1e-12


@pytest.mark.parametrize("input_first", [False, True])
def test_memory_of_a_weight_is_free_between_forward_and_backward(input_first):
    """Where a parameter is emptied after its layer ran and refilled before its layer's backward, as ZeRO-3 does it."""
    groups = make_groups(*GROUPS["ragged"])
    whole = randn(OUTPUTS, INPUTS, seed=2)
    weight = torch.nn.Parameter((whole.T if input_first else whole).clone(), requires_grad=False)
    x = randn(groups.rows, INPUTS, seed=1).requires_grad_()
    again = x.detach().clone().requires_grad_()
    _, a, b = _bank(4)
    upstream = randn(groups.rows, OUTPUTS, seed=6)

    y = lora_linear(x, weight, None, a.requires_grad_(), b, groups, SCALE, None, None, input_first=input_first)
    values, address = weight.data.clone(), weight.data_ptr()
    weight.data = values.new_empty(0)
    ((op, _),) = y.grad_fn.next_functions  # The result is a view of what the op returned.
    assert address not in [kept.data_ptr() for kept in op.saved_tensors if kept is not None]
    weight.data = values
    y.backward(upstream)

    expected = lora_linear_reference(again, whole, None, a, b, groups, SCALE)
    expected.backward(upstream)
    assert relative_error(y, expected) < 1e-12
    assert relative_error(x.grad, again.grad) < 1e-12


@pytest.mark.parametrize("with_dropout", [False, True])
@pytest.mark.parametrize("grad_x", [False, True])
@pytest.mark.parametrize("frozen", [("grad_a",), ("grad_b",), ("grad_a", "grad_b")])
def test_a_frozen_factor_leaves_the_other_gradients_as_they_are(frozen, grad_x, with_dropout):
    case = lora_case([5, 0, 1, 3], ranks=(4,), dropout=0.4 if with_dropout else None)
    found, expected = case.run(frozen=frozen, grad_x=grad_x), case.run()
    assert set(found) == set(expected) - set(frozen) - (set() if grad_x else {"grad_x"})
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_a_frozen_factor_keeps_nothing_for_its_gradient():
    """x is by far the largest tensor of an adapter; frozen A (FFA-LoRA) does without it until backward."""
    case = lora_case([5, 3])
    x, sink = case.x.clone().requires_grad_(), torch.zeros(case.lora_b.shape)
    y = lora_linear(x, case.weight, None, case.lora_a, case.lora_b, case.groups, SCALE, None, sink)
    assert x.data_ptr() not in {t.data_ptr() for t in y._base.grad_fn.saved_tensors if t is not None}


@pytest.mark.parametrize("with_dropout", [False, True])
@pytest.mark.parametrize("frozen", [(), ("grad_a",), ("grad_b",)])
def test_without_a_weight_the_low_rank_product_is_all(frozen, with_dropout):
    case = lora_case([5, 0, 1, 3], dropout=0.4 if with_dropout else None, weight=False)
    found = case.run(frozen=frozen)
    assert_close(found, {name: case.expected()[name] for name in found}, 1e-5)


def test_untouched_slots_keep_their_sink():
    groups = make_groups([2, 3], [1, 4])
    x = randn(5, INPUTS, seed=1).requires_grad_()
    _, a, b = _bank(4)
    grad_a, grad_b = torch.full_like(a, 7.0), torch.full_like(b, 7.0)
    lora_linear(x, randn(OUTPUTS, INPUTS, seed=2), None, a, b, groups, SCALE, grad_a, grad_b).sum().backward()
    untouched = [0, 2, 3, 5, 6]
    assert (grad_a[untouched] == 7.0).all()
    assert (grad_b[untouched] == 7.0).all()


def test_sinks_are_filled_when_the_input_needs_no_gradient():
    groups = make_groups([2, 3], [1, 4])
    _, a, b = _bank(4)
    grad_a, grad_b = torch.zeros_like(a), torch.zeros_like(b)
    a.requires_grad_()
    x = randn(5, INPUTS, seed=1)
    lora_linear(x, randn(OUTPUTS, INPUTS, seed=2), None, a, b, groups, SCALE, grad_a, grad_b).sum().backward()
    assert grad_a[1].abs().sum() > 0
    assert a.grad is None


def test_padded_rank_has_no_gradient():
    groups = make_groups([2, 3], [1, 4])
    _, a, b = _bank(4)
    a[4, 2:], b[4, :, 2:] = 0.0, 0.0
    grad_a, grad_b = torch.zeros_like(a), torch.zeros_like(b)
    x = randn(5, INPUTS, seed=1).requires_grad_()
    lora_linear(x, randn(OUTPUTS, INPUTS, seed=2), None, a, b, groups, SCALE, grad_a, grad_b).sum().backward()
    assert (grad_a[4, 2:] == 0).all()
    assert (grad_b[4, :, 2:] == 0).all()
    assert (grad_a[1] != 0).all()


def test_leading_dimensions_are_flattened():
    groups = make_groups([2, 1], [1, 4])
    _, a, b = _bank(4)
    x, weight = randn(3, 5, INPUTS, seed=1), randn(OUTPUTS, INPUTS, seed=2)
    tokens = groups.per_token(5)
    y = lora_linear(x, weight, None, a, b, tokens, SCALE, torch.zeros_like(a), torch.zeros_like(b))
    flat = lora_linear_reference(x.view(15, INPUTS), weight, None, a, b, tokens, SCALE)
    assert y.shape == (3, 5, OUTPUTS)
    assert relative_error(y.view(15, OUTPUTS), flat) < 1e-12


@pytest.mark.parametrize("slots", [[2, 3], [5, 1]])
def test_fp32_sinks_of_a_bf16_bank(slots):
    groups = make_groups([2, 3], slots)
    _, a, b = _bank(4, torch.bfloat16)
    grad_a, grad_b = torch.zeros(a.shape), torch.zeros(b.shape)
    x = randn(5, INPUTS, seed=1, dtype=torch.bfloat16).requires_grad_()
    weight = randn(OUTPUTS, INPUTS, seed=2, dtype=torch.bfloat16)
    lora_linear(x, weight, None, a, b, groups, SCALE, grad_a, grad_b).sum().backward()
    leaves = [t.detach().double().requires_grad_() for t in (x, a, b)]
    lora_linear_reference(leaves[0], weight.double(), None, leaves[1], leaves[2], groups, SCALE).sum().backward()
    assert relative_error(grad_a, leaves[1].grad) < 2e-2
    assert relative_error(grad_b, leaves[2].grad) < 2e-2


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("x", lambda args: args | {"x": args["x"][:, :-1]}),
        ("groups", lambda args: args | {"x": args["x"][:-1]}),
        ("lora_a", lambda args: args | {"lora_a": args["lora_a"].float()}),
        ("lora_b", lambda args: args | {"lora_b": args["lora_b"][:, :, :-1]}),
        ("grad_a", lambda args: args | {"grad_a": args["grad_a"][1:]}),
        ("grad_b", lambda args: args | {"grad_a": None, "grad_b": args["grad_a"]}),
        ("bias", lambda args: args | {"bias": torch.zeros(3, dtype=torch.float64)}),
        ("bias", lambda args: args | {"weight": None, "bias": torch.zeros(OUTPUTS, dtype=torch.float64)}),
        ("groups", lambda args: args | {"groups": make_groups([2, 3], [1, SLOTS])}),
        ("lora_a", lambda args: args | {"lora_a": randn(SLOTS, INPUTS, RANK, seed=1).transpose(1, 2)}),
    ],
)
def test_bad_arguments_are_named(name, change):
    _, a, b = _bank(4)
    args = {
        "x": randn(5, INPUTS, seed=1),
        "weight": randn(OUTPUTS, INPUTS, seed=2),
        "bias": None,
        "lora_a": a,
        "lora_b": b,
        "groups": make_groups([2, 3], [1, 4]),
        "scale": SCALE,
        "grad_a": torch.zeros_like(a),
        "grad_b": torch.zeros_like(b),
    }
    with pytest.raises(ValueError, match=f"^{name}: found .*expected"):
        lora_linear(**change(args))
