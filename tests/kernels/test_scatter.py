"""Row moves against autograd through the references."""

import pytest
import torch

from fedra_kernels import (
    gather_rows,
    gather_rows_reference,
    scatter_add,
    scatter_add_reference,
    scatter_rows,
    scatter_rows_reference,
)

from .helpers import randn

INDEX = torch.tensor([4, 0, 3])


def _compare(op, reference, *tensors, trailing=()):
    ours = [t.clone().requires_grad_() for t in tensors]
    theirs = [t.clone().requires_grad_() for t in tensors]
    y, expected = op(*ours, *trailing), reference(*theirs, *trailing)
    torch.testing.assert_close(y, expected)
    upstream = randn(*y.shape, seed=9)
    y.backward(upstream)
    expected.backward(upstream)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


@pytest.mark.parametrize("shape", [(5, 3), (5, 2, 3)])
def test_gather_and_scatter_rows_equal_indexing(shape):
    x, rows = randn(*shape, seed=1), randn(3, *shape[1:], seed=2)
    _compare(gather_rows, gather_rows_reference, x, trailing=(INDEX,))
    _compare(scatter_rows, scatter_rows_reference, x, rows, trailing=(INDEX,))


@pytest.mark.parametrize("scale", [None, randn(3, seed=3)])
def test_scatter_add_equals_index_add(scale):
    x, y = randn(5, 3, seed=1), randn(3, 3, seed=2)
    _compare(lambda x, *rest: scatter_add(x.clone(), *rest), scatter_add_reference, x, y, trailing=(INDEX, scale))


def test_scatter_add_works_in_place():
    x, y = randn(5, 3, seed=1), randn(3, 3, seed=2)
    expected = scatter_add_reference(x, y, INDEX)
    assert scatter_add(x, y, INDEX) is x
    torch.testing.assert_close(x, expected)


def test_bad_arguments_are_named():
    x = randn(5, 3, seed=1)
    with pytest.raises(ValueError, match=r"^index: found dtype"):
        gather_rows(x, INDEX.int())
    with pytest.raises(ValueError, match=r"^rows: found shape"):
        scatter_rows(x, x, INDEX)
    with pytest.raises(ValueError, match=r"^y: found shape"):
        scatter_add(x, x, INDEX)
