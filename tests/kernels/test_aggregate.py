"""The streaming mean equals the loop over slots, in any cut of the stream."""

import pytest
import torch

from fedra_kernels import aggregate, aggregate_reference, finish_aggregate

from .helpers import randn

SLOTS = torch.tensor([5, 2, 0, 3, 7, 1])
BLOCKS = torch.tensor([1, 3, 1, 0, 3, 1])
WEIGHTS = torch.tensor([1.0, 2.0, 0.5, 3.0, 1.5, 4.0], dtype=torch.float64)


def _zeros():
    return torch.zeros(4, 300_001 // 50, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)


def test_sums_equal_the_reference_and_do_not_depend_on_the_cut():
    values = randn(8, 6000, seed=1, dtype=torch.float32)
    expected = aggregate_reference(*_zeros(), values, SLOTS, BLOCKS, WEIGHTS)
    whole, parts = _zeros(), _zeros()
    aggregate(*whole, values, SLOTS, BLOCKS, WEIGHTS)
    for piece in (slice(0, 2), slice(2, 2), slice(2, 6)):
        aggregate(*parts, values, SLOTS[piece], BLOCKS[piece], WEIGHTS[piece])
    for found in (whole, parts):
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


def test_blocks_nobody_holds_keep_their_previous_value():
    numerator, denominator = _zeros()
    values = randn(8, 6000, seed=1, dtype=torch.float32)
    previous = randn(4, 6000, seed=2, dtype=torch.float32)
    aggregate(numerator, denominator, values, SLOTS, BLOCKS, WEIGHTS)
    mean = finish_aggregate(numerator, denominator, previous)
    assert mean.dtype == previous.dtype
    assert torch.equal(mean[2], previous[2])
    expected = (2.0 * values[2].double() + 1.5 * values[7].double()) / 3.5
    torch.testing.assert_close(mean[3], expected.float())


def test_bad_arguments_are_named():
    values = randn(8, 6000, seed=1)
    with pytest.raises(ValueError, match=r"^weights: found dtype"):
        aggregate(*_zeros(), values, SLOTS, BLOCKS, WEIGHTS.float())
    with pytest.raises(ValueError, match=r"^slots: found 8"):
        aggregate(*_zeros(), values, SLOTS + 1, BLOCKS, WEIGHTS)
    with pytest.raises(ValueError, match=r"^blocks: found 4"):
        aggregate(*_zeros(), values, SLOTS, BLOCKS + 1, WEIGHTS)
