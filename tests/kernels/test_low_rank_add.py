"""`low_rank_add` against its reference, whose gradients are autograd's, and against the map row by row."""

import pytest
import torch
from torch.autograd import gradcheck

from fedra_kernels import low_rank_add, low_rank_add_reference

from .helpers import randn

INDEX = torch.tensor([4, 0, 3])
ROWS, WIDTH = 6, 5


def _factors(rank, dtype=torch.float64):
    shapes = (WIDTH, rank), (rank, WIDTH), (rank,), (WIDTH,)
    return [randn(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes)]


@pytest.mark.parametrize("rank", [0, 1, 3, 128])
@pytest.mark.parametrize("shape", [(ROWS, WIDTH), (2, 3, WIDTH)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_values_and_gradient_equal_the_references(rank, shape, dtype, tolerance):
    stream, upstream = (randn(*shape, seed=seed, dtype=dtype) for seed in (8, 9))
    ours, theirs = (stream.clone().requires_grad_() for _ in range(2))
    found = low_rank_add(ours.clone(), INDEX, *_factors(rank, dtype))
    expected = low_rank_add_reference(theirs, INDEX, *_factors(rank, dtype))
    close = {"rtol": tolerance, "atol": tolerance * float(expected.detach().abs().max())}
    torch.testing.assert_close(found, expected, **close)
    found.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(ours.grad, theirs.grad, **close)


def test_each_row_gets_its_distance_from_the_mean_through_the_map():
    down, up, _, bias = _factors(2)
    mean, stream = randn(WIDTH, seed=6), randn(ROWS, WIDTH, seed=7)
    expected = stream.clone()
    for row in INDEX.tolist():
        expected[row] += (stream[row] - mean) @ (down @ up) + bias
    torch.testing.assert_close(low_rank_add(stream, INDEX, down, up, -mean @ down, bias), expected)


def test_the_op_passes_gradcheck():
    stream = randn(ROWS, WIDTH, seed=7).requires_grad_()
    assert gradcheck(lambda stream: low_rank_add(stream * 1.0, INDEX, *_factors(2)), stream)


def test_it_works_in_place_and_may_have_no_rows():
    stream = randn(ROWS, WIDTH, seed=7)
    expected = low_rank_add_reference(stream, INDEX, *_factors(2))
    assert low_rank_add(stream, INDEX, *_factors(2)) is stream
    torch.testing.assert_close(stream, expected)
    before = stream.clone()
    assert torch.equal(low_rank_add(stream, INDEX[:0], *_factors(2)), before)


def test_backward_leaves_the_gradient_of_others_alone():
    """A sum gives one gradient to both its terms, and the caller keeps the one it gave."""
    stream, other = (randn(ROWS, WIDTH, seed=seed).requires_grad_() for seed in (7, 8))
    upstream = randn(ROWS, WIDTH, seed=9)
    kept = upstream.clone()
    low_rank_add(stream * 1.0, INDEX, *_factors(2)).add(other).backward(upstream)
    assert torch.equal(upstream, kept)
    assert torch.equal(other.grad, kept)
    assert not torch.equal(stream.grad, kept)


def test_a_gradient_that_is_not_contiguous_is_taken():
    stream = randn(ROWS, WIDTH, seed=7).requires_grad_()
    low_rank_add(stream * 1.0, INDEX, *_factors(2)).sum().backward()
    down, up, _, _ = _factors(2)
    expected = torch.ones(ROWS, WIDTH, dtype=torch.float64)
    expected[INDEX] += (down @ up).sum(1)
    torch.testing.assert_close(stream.grad, expected)


def test_a_rank_out_of_range_is_named():
    with pytest.raises(ValueError, match=r"^up: found rank 129, expected at most 128"):
        low_rank_add(randn(ROWS, WIDTH, seed=7), INDEX, *_factors(129))
