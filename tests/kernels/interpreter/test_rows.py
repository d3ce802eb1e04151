"""What moves rows, and the steps of a block beside its products, against float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedra_kernels import low_rank_add, low_rank_add_reference
from fedra_kernels._kernels.activation import activation_forward, activation_tile
from fedra_kernels.dropout import keep_mask

from ..cases import TOLERANCE, assert_close, surrounded
from ..helpers import randn
from ..launcher_cases import (
    Launcher,
    check_activation,
    check_norm,
    check_outer,
    check_output_gradient,
    check_rows_outside,
)

DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
# The interpreter's tiles have 16 rows, and chunks of sums 32: groups that fill, split, share and straddle them.
SIZES = {"ragged": [33, 0, 1, 1, 64, 0, 5], "straddling": [20, 30, 40], "one row": [1], "empty": [0, 0]}
GROUPS = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
DROPOUT = pytest.mark.parametrize("dropout", [None, 0.3])


def _matrix(rows, columns, seed, dtype, *, scale=1.0):
    return surrounded((randn(rows, columns, seed=seed, dtype=torch.float32) * scale).to(dtype))


def _index(count, rows):
    """`rows` different ones of `count` rows."""
    return surrounded(torch.randperm(count, generator=torch.Generator().manual_seed(3))[:rows])


def _leaf(tensor):
    """A leaf on the same memory, so that what surrounds it stays."""
    return tensor.detach().requires_grad_()


def _grads(outputs, inputs, upstream):
    return torch.autograd.grad(outputs, inputs, upstream, materialize_grads=True)


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
@GROUPS
@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("indexed", [False, True])
def test_a_norm_equals_float64(sizes, kind, dtype, indexed):
    check_norm(Launcher(sizes, "cpu", dtype), kind, 50, banks=0, indexed=indexed)


@DTYPES
@GROUPS
@DROPOUT
@pytest.mark.parametrize("banks", [1, 2, 3])
def test_a_norm_shrinks_for_each_adapter(sizes, banks, dropout, dtype):
    check_norm(Launcher(sizes, "cpu", dtype, dropout=dropout), "layer", 48, banks=banks)


@DTYPES
@GROUPS
@DROPOUT
@pytest.mark.parametrize("kind", ["gelu", "gelu_tanh", "swiglu"])
def test_an_activation_equals_float64_and_sums_up_gradients(sizes, kind, dropout, dtype):
    check_activation(Launcher(sizes, "cpu", dtype, dropout=dropout), kind, 50, rank=8)


@pytest.mark.parametrize("of", ["", "A", "B"])
@pytest.mark.parametrize("rank", [3, 40])
def test_an_activation_sums_up_only_what_is_asked_for(of, rank):
    check_activation(Launcher(SIZES["ragged"], "cpu", torch.float32), "gelu", 33, rank=rank, of=of)


@DTYPES
@GROUPS
@pytest.mark.parametrize(("indexed", "scaled"), [(False, False), (True, False), (False, True), (True, True)])
def test_one_read_of_a_gradient_gives_its_rows_ds_and_db(sizes, indexed, scaled, dtype):
    check_output_gradient(Launcher(sizes, "cpu", dtype), [50], rank=8, indexed=indexed, scaled=scaled)


@GROUPS
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("widths", [(40, 40), (40, 33, 70)], ids=str)
def test_one_launch_takes_the_gradients_of_layers_of_one_input(sizes, widths, trained):
    check_output_gradient(Launcher(sizes, "cpu", torch.float32), widths, rank=5, trained=trained)


@DTYPES
@GROUPS
@DROPOUT
@pytest.mark.parametrize("kind", [None, "layer", "rms"])
def test_da_of_the_norm_of_rows_equals_float64(sizes, kind, dropout, dtype):
    check_outer(Launcher(sizes, "cpu", dtype, dropout=dropout), kind, 50, rank=8, banks=1 if dropout else 3)


def test_rows_outside_the_stream_are_left_out():
    check_rows_outside("cpu", 40)


@settings(max_examples=10)
@given(
    sizes=st.lists(st.integers(0, 20), min_size=1, max_size=4),
    features=st.sampled_from([16, 33, 64]),
    kind=st.sampled_from(["layer", "rms"]),
    banks=st.integers(0, 3),
    rank=st.integers(1, 20),
    indexed=st.booleans(),
    dropout=st.sampled_from([None, 0.2]),
)
def test_norms_of_drawn_groups_equal_float64(sizes, features, kind, banks, rank, indexed, dropout):
    check_norm(
        Launcher(sizes, "cpu", torch.float32, dropout=dropout), kind, features, banks=banks, rank=rank, indexed=indexed
    )


@settings(max_examples=10)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    features=st.sampled_from([16, 33, 64]),
    kind=st.sampled_from(["gelu", "gelu_tanh", "swiglu"]),
    rank=st.integers(1, 20),
    dropout=st.sampled_from([None, 0.2]),
)
def test_activations_of_drawn_groups_equal_float64(sizes, features, kind, rank, dropout):
    check_activation(Launcher(sizes, "cpu", torch.float32, dropout=dropout), kind, features, rank=rank)


def test_the_mask_is_the_one_of_the_torch_path():
    case = Launcher([20, 0, 17], "cpu", torch.float32, dropout=0.4)
    drop = case.dropout(7)
    assert drop is not None
    identity = torch.eye(32).expand(7, 32, 32).contiguous()
    x = torch.full((37, 32), 5.0)
    chunks = case.groups.chunks(activation_tile(x, identity).rows).rows
    _, shrunk = activation_forward("gelu", x, None, identity, chunks, drop.keys, drop.threshold)
    assert torch.equal(shrunk != 0, keep_mask(drop, case.groups.sizes, 32))
