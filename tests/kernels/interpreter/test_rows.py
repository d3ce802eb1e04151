"""scatter_add, low_rank_add, gather_norm and the activations against the float64 references."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedra_kernels import (
    Dropout,
    activation_reference,
    dropout_key,
    gather_norm,
    gather_norm_reference,
    gelu,
    low_rank_add,
    low_rank_add_reference,
    scatter_add,
    scatter_add_reference,
    swiglu,
)
from fedra_kernels.dropout import keep_mask

from ..cases import TOLERANCE, assert_close, lora_case, surrounded
from ..helpers import randn

DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def _matrix(rows, columns, seed, dtype, *, scale=1.0, shift=0.0):
    return surrounded((randn(rows, columns, seed=seed, dtype=torch.float32) * scale + shift).to(dtype))


def _index(count, rows):
    """`rows` different ones of `count` rows."""
    return surrounded(torch.randperm(count, generator=torch.Generator().manual_seed(3))[:rows])


def _leaf(tensor):
    """A leaf on the same memory, so that what surrounds it stays."""
    return tensor.detach().requires_grad_()


def _grads(outputs, inputs, upstream):
    return torch.autograd.grad(outputs, inputs, upstream, materialize_grads=True)


def _expected_shrink(x, case):
    """drop(x) A_k^T in float64, without the factor 1 / (1 - p)."""
    x = x.double()
    if case.dropout is not None:
        x = x * keep_mask(case.dropout, case.groups.sizes, x.shape[1])
    parts = x.split(case.groups.sizes)
    return torch.cat(
        [part @ case.lora_a[slot].double().T for part, slot in zip(parts, case.groups.host_slots, strict=True)]
    )


@DTYPES
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("features", [40, 300])
def test_scatter_add_equals_its_reference(dtype, scaled, features):
    stream, y = _matrix(25, features, 1, dtype), _matrix(18, features, 2, dtype)
    index = _index(25, 18)
    scale = _matrix(1, features, 4, dtype)[0] if scaled else None
    leaves = [_leaf(stream), _leaf(y)]
    found = scatter_add(leaves[0] * 1.0, leaves[1], index, scale)
    wide = [tensor.double().requires_grad_() for tensor in (stream, y)]
    expected = scatter_add_reference(*wide, index, None if scale is None else scale.double())
    upstream = _matrix(25, features, 5, dtype)
    grads, wants = _grads(found, leaves, upstream), _grads(expected, wide, upstream.double())
    assert_close(
        {"sum": found, "residual": grads[0], "y": grads[1]},
        {"sum": expected, "residual": wants[0], "y": wants[1]},
        TOLERANCE[dtype],
    )


@DTYPES
@pytest.mark.parametrize(("rank", "features"), [(0, 40), (1, 40), (20, 100), (32, 64), (100, 33)])
@pytest.mark.parametrize("rows", [0, 1, 18])
def test_low_rank_add_equals_its_reference(dtype, rank, features, rows):
    stream, index, upstream = _matrix(25, features, 1, dtype), _index(25, rows), _matrix(25, features, 2, dtype)
    down = _matrix(features, rank, 3, dtype, scale=features**-0.5)
    up = _matrix(rank, features, 4, dtype, scale=max(rank, 1) ** -0.5)
    shift, bias = _matrix(1, rank, 5, dtype)[0], _matrix(1, features, 6, dtype)[0]
    leaf, wide = _leaf(stream), stream.double().requires_grad_()
    found = low_rank_add(leaf * 1.0, index, down, up, shift, bias)
    expected = low_rank_add_reference(wide, index, *(each.double() for each in (down, up, shift, bias)))
    (grad,), (want,) = _grads(found, [leaf], upstream), _grads(expected, [wide], upstream.double())
    assert_close({"sum": found, "grad": grad}, {"sum": expected, "grad": want}, TOLERANCE[dtype])
    untouched = [row for row in range(25) if row not in index.tolist()]
    assert torch.equal(found[untouched], stream[untouched])
    assert torch.equal(grad[untouched], upstream[untouched])


@DTYPES
@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize(("rows", "features"), [(0, 32), (1, 50), (40, 128)])
def test_gather_norm_equals_its_reference(dtype, kind, rows, features):
    hidden, index = _matrix(45, features, 1, dtype, shift=3.0), _index(45, rows)
    weight = _matrix(1, features, 2, dtype)[0]
    bias = _matrix(1, features, 4, dtype)[0] if kind == "layer" else None
    leaf, wide = _leaf(hidden), hidden.double().requires_grad_()
    x, shrunk = gather_norm(leaf, index, weight, bias, kind=kind, eps=1e-5)
    assert shrunk == ()
    wide_bias = None if bias is None else bias.double()
    expected = gather_norm_reference(wide, index, weight.double(), wide_bias, kind=kind, eps=1e-5)
    upstream = _matrix(rows, features, 5, dtype)
    (grad,), (want,) = _grads(x, [leaf], upstream), _grads(expected, [wide], upstream.double())
    assert_close({"x": x, "grad": grad}, {"x": expected, "grad": want}, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropout", [None, 0.4])
@pytest.mark.parametrize("banks", [1, 2, 3])
def test_gather_norm_shrinks_for_each_bank(dtype, dropout, banks):
    cases = [lora_case([20, 0, 1, 17], ranks=(8, 3), dtype=dtype, dropout=dropout, seed=seed) for seed in range(banks)]
    groups = cases[0].groups
    hidden, index = _matrix(60, 48, 1, dtype), _index(60, 38)
    weight, bias = _matrix(1, 48, 2, dtype)[0], _matrix(1, 48, 4, dtype)[0]
    drops = [case.dropout for case in cases] if dropout else ()
    banks_a = [case.lora_a for case in cases]
    x, shrunk = gather_norm(
        hidden, index, weight, bias, kind="layer", eps=1e-5, lora_a=banks_a, groups=groups, dropout=drops
    )
    expected = gather_norm_reference(hidden.double(), index, weight.double(), bias.double(), kind="layer", eps=1e-5)
    assert_close({"x": x}, {"x": expected}, TOLERANCE[dtype])
    for found, case in zip(shrunk, cases, strict=True):
        assert_close({"shrunk": found}, {"shrunk": _expected_shrink(x, case)}, TOLERANCE[dtype])


@DTYPES
@pytest.mark.parametrize("kind", ["gelu", "gelu_tanh", "swiglu"])
@pytest.mark.parametrize("rows", [0, 1, 40])
def test_activations_equal_their_reference(dtype, kind, rows):
    x, up, upstream = (_matrix(rows, 50, seed, dtype, scale=2.0) for seed in (1, 2, 3))
    leaves = [_leaf(tensor) for tensor in ((x, up) if kind == "swiglu" else (x,))]
    wide = [tensor.double().requires_grad_() for tensor in leaves]
    if kind == "swiglu":
        y, shrunk = swiglu(*leaves)
    else:
        y, shrunk = gelu(leaves[0], approximate="none" if kind == "gelu" else "tanh")
    assert shrunk is None
    expected = activation_reference(kind, wide[0], wide[1] if kind == "swiglu" else None)
    grads, wants = _grads(y, leaves, upstream), _grads(expected, wide, upstream.double())
    assert_close(
        {"y": y} | {f"grad{i}": grad for i, grad in enumerate(grads)},
        {"y": expected} | {f"grad{i}": want for i, want in enumerate(wants)},
        TOLERANCE[dtype],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropout", [None, 0.4])
@pytest.mark.parametrize("kind", ["gelu", "swiglu"])
def test_activations_shrink_for_the_layer_that_reads_them(dtype, dropout, kind):
    case = lora_case([20, 0, 1, 17], ranks=(8, 3), dtype=dtype, dropout=dropout)
    options = {"lora_a": case.lora_a, "groups": case.groups, "dropout": case.dropout}
    y, shrunk = gelu(case.x, **options) if kind == "gelu" else swiglu(case.x, case.x, **options)
    expected = _expected_shrink(y, case)
    assert_close({"shrunk": shrunk}, {"shrunk": expected}, TOLERANCE[dtype])


@settings(max_examples=10)
@given(
    sizes=st.lists(st.integers(0, 20), min_size=1, max_size=4),
    features=st.sampled_from([16, 33, 64]),
    kind=st.sampled_from(["layer", "rms"]),
    banks=st.integers(1, 3),
    dropout=st.sampled_from([None, 0.2]),
)
def test_gather_norm_of_drawn_groups_equals_its_reference(sizes, features, kind, banks, dropout):
    case = lora_case(sizes, inputs=features, dropout=dropout)
    hidden, index = _matrix(sum(sizes) + 3, features, 1, torch.float32), _index(sum(sizes) + 3, sum(sizes))
    weight = _matrix(1, features, 2, torch.float32)[0]
    bias = _matrix(1, features, 4, torch.float32)[0] if kind == "layer" else None
    leaf, wide = _leaf(hidden), hidden.double().requires_grad_()
    x, shrunk = gather_norm(
        leaf, index, weight, bias, kind=kind, eps=1e-5, lora_a=[case.lora_a] * banks, groups=case.groups,
        dropout=() if dropout is None else [case.dropout] * banks,
    )  # fmt: skip
    expected = gather_norm_reference(
        wide, index, weight.double(), None if bias is None else bias.double(), kind=kind, eps=1e-5
    )
    upstream = _matrix(sum(sizes), features, 5, torch.float32)
    (grad,), (want,) = _grads(x, [leaf], upstream), _grads(expected, [wide], upstream.double())
    assert_close({"x": x, "grad": grad}, {"x": expected, "grad": want}, 1e-5)
    assert len(shrunk) == banks
    for part in shrunk:
        assert_close({"shrunk": part}, {"shrunk": _expected_shrink(x, case)}, 1e-5)


@settings(max_examples=10)
@given(
    sizes=st.lists(st.integers(0, 20), min_size=1, max_size=4),
    features=st.sampled_from([16, 33, 64]),
    kind=st.sampled_from(["gelu", "gelu_tanh", "swiglu"]),
    dropout=st.sampled_from([None, 0.2]),
)
def test_activations_of_drawn_groups_equal_their_reference(sizes, features, kind, dropout):
    case = lora_case(sizes, inputs=features, dropout=dropout)
    leaves = [_leaf(case.x)] if kind != "swiglu" else [_leaf(case.x), _leaf(_matrix(*case.x.shape, 1, torch.float32))]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    options = {"lora_a": case.lora_a, "groups": case.groups, "dropout": case.dropout}
    if kind == "swiglu":
        y, shrunk = swiglu(*leaves, **options)
    else:
        y, shrunk = gelu(*leaves, approximate="none" if kind == "gelu" else "tanh", **options)
    expected = activation_reference(kind, wide[0], wide[1] if kind == "swiglu" else None)
    upstream = _matrix(*case.x.shape, 5, torch.float32)
    grads, wants = _grads(y, leaves, upstream), _grads(expected, wide, upstream.double())
    found = {"y": y, "shrunk": shrunk} | {str(number): grad for number, grad in enumerate(grads)}
    wanted = {"y": expected, "shrunk": _expected_shrink(y, case)} | {str(n): want for n, want in enumerate(wants)}
    assert_close(found, wanted, 1e-5)


def test_the_mask_is_the_one_of_the_torch_path():
    case = lora_case([20, 0, 17], dropout=0.4)
    identity = torch.zeros(case.lora_a.shape[0], 48, 48)
    identity[:] = torch.eye(48)
    keys = torch.tensor([dropout_key(7, group) for group in range(3)])
    drop = Dropout(0.4, keys)
    _y, shrunk = gelu(torch.full((37, 48), 5.0), lora_a=identity, groups=case.groups, dropout=drop)
    assert torch.equal(shrunk != 0, keep_mask(drop, case.groups.sizes, 48))
