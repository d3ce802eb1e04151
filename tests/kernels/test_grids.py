"""No launch has more programs in a grid's second and third dimension than a GPU takes."""

import pytest
import torch

from fedra_kernels import adamw, aggregate, sgd

from .launches import record_launches

MOST_PROGRAMS = 65_535
ENTRIES = 68_000_000
"""Of a slot, such as a classifier of 16,600 classes on 4,096 features."""


def _sgd(bank, ones):
    sgd(bank, bank, None, torch.arange(1), ones, ones, torch.arange(1), momentum=0.0, weight_decay=0.0)


def _adamw(bank, ones):
    adamw(
        bank, bank, bank, bank, torch.arange(1), ones, ones, torch.arange(1),
        betas=(0.9, 0.9), eps=1e-8, weight_decay=0.0,
    )  # fmt: skip


def _aggregate(bank, ones):
    aggregate(torch.empty(1, ENTRIES), ones, bank, torch.zeros(1).long(), torch.zeros(1).long(), ones)


@pytest.mark.parametrize("op", [_sgd, _adamw, _aggregate])
def test_slots_may_be_large(op):
    with record_launches() as launches:
        op(torch.empty(1, ENTRIES), torch.ones(1))
    assert launches
    for launch in launches:
        assert all(extent <= MOST_PROGRAMS for extent in launch.grid[1:]), launch.kernel.__name__
