"""The dropout mask: independent of batching, right rate, no visible structure."""

import numpy as np
import pytest
import torch

from fedra_kernels import Dropout, dropout_key, dropout_keys, dropout_mask
from fedra_kernels.dropout import keep_mask


def test_a_groups_mask_does_not_depend_on_its_neighbours():
    keys = [dropout_key(0, client, 1) for client in range(4)]
    together = keep_mask(Dropout(0.3, torch.tensor(keys)), [5, 0, 7, 2], 33)
    for group, (start, size) in enumerate([(0, 5), (5, 0), (5, 7), (12, 2)]):
        alone = dropout_mask(keys[group], size, 33, 0.3)
        assert torch.equal(together[start : start + size], alone != 0)


def test_a_longer_group_extends_the_mask():
    key = dropout_key(1, 2, 3)
    assert torch.equal(dropout_mask(key, 9, 20, 0.5)[:4], dropout_mask(key, 4, 20, 0.5))
    assert torch.equal(dropout_mask(key, 4, 30, 0.5)[:, :20], dropout_mask(key, 4, 20, 0.5))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_kept_share_and_values(p):
    mask = dropout_mask(dropout_key(5), 1000, 768, p)
    assert abs(float((mask == 0).float().mean()) - p) < 4 * (p * (1 - p) / mask.numel()) ** 0.5
    assert mask.unique().tolist() == pytest.approx([0.0, 1 / (1 - p)])


def test_rows_columns_and_keys_are_uncorrelated():
    keep = [dropout_mask(dropout_key(7, part), 512, 512, 0.5) - 1.0 for part in range(2)]
    bound = 6 / 512  # six standard errors over the 512 x 512 entries
    for other in (keep[1], keep[0].roll(1, 0), keep[0].roll(1, 1), keep[0].T, keep[0].roll((1, 1), (0, 1))):
        assert abs(float((keep[0] * other).mean())) < bound
    for rates in (keep[0].mean(0), keep[0].mean(1)):
        assert float(rates.abs().max()) < 6 / 512**0.5
    quads = keep[0] * keep[0].roll(1, 0) * keep[0].roll(1, 1) * keep[0].roll((1, 1), (0, 1))
    assert abs(float(quads.mean())) < bound


def test_keys_differ_by_every_part_and_by_order():
    keys = {dropout_key(*parts) for parts in [(0,), (1,), (0, 0), (0, 1), (1, 0), (-1, 0), (2**63, 1)]}
    assert len(keys) == 7
    assert all(0 <= key < 2**63 for key in keys)


def test_mask_of_a_fixed_key_is_fixed():
    mask = dropout_mask(dropout_key(1, 2), 4, 16, 0.5) != 0
    packed = [sum(int(bit) << column for column, bit in enumerate(row)) for row in mask]
    assert packed == GOLDEN


@pytest.mark.parametrize("p", [0.0, 1.0, -0.1])
def test_probabilities_outside_the_open_interval_are_rejected(p):
    with pytest.raises(ValueError, match=r"^p: found"):
        Dropout(p, torch.tensor([1]))


GOLDEN = [48415, 25972, 43437, 26669]


def test_keys_of_arrays_are_those_of_their_integers():
    clients, steps = np.array([0, 5, 2**40]), np.array([[0], [3]])
    keys = dropout_keys(-1, 2**63, clients, steps)
    assert keys.tolist() == [[dropout_key(-1, 2**63, c, s) for c in clients.tolist()] for s in (0, 3)]
