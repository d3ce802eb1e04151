"""Deterministic aggregation on a GPU: the bits of the CPU, in any order."""

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from tests.federation.updates import ALLOCATION, deterministic_results, make_round


def _on_gpu(record):
    tensors = {field.name: getattr(record, field.name) for field in fields(record)}
    return replace(record, **{name: value.cuda() for name, value in tensors.items() if isinstance(value, Tensor)})


@pytest.mark.parametrize("weighting", ["uniform", "samples"])
def test_deterministic_sums_are_the_cpus_bit_for_bit(weighting):
    previous, updates = make_round(3, ALLOCATION, torch.float32)
    expected = deterministic_results(previous, updates, weighting)
    there = [_on_gpu(update) for update in updates]
    for order, portions in ((there, 1), (there[::-1], 1), (there[2:] + there[:2], 3)):
        found = deterministic_results(_on_gpu(previous), order, weighting, portions)
        for mine, theirs in zip(found, expected, strict=True):
            assert torch.equal(mine.cpu(), theirs)
