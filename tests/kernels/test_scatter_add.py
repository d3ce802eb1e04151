"""`scatter_add` against autograd through its reference."""

import pytest
import torch

from fedra_kernels import scatter_add, scatter_add_reference

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
        scatter_add(x, x[:3], INDEX.int())
    with pytest.raises(ValueError, match=r"^y: found shape"):
        scatter_add(x, x, INDEX)
