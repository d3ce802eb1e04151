"""Deterministic aggregation through the Triton kernel: exact sums, and so those of the torch path."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedra_kernels import dispatch
from tests.federation.updates import ALLOCATION, deterministic_results, make_round


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize("weighting", ["uniform", "samples"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_deterministic_sums_are_the_torch_paths_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, weighting: str
) -> None:
    previous, updates = make_round(3, ALLOCATION, dtype)
    whole = deterministic_results(previous, updates, weighting)
    assert equal(deterministic_results(previous, updates[::-1], weighting), whole)
    assert equal(deterministic_results(previous, updates[2:] + updates[:2], weighting, portions=3), whole)
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    assert equal(deterministic_results(previous, updates, weighting), whole)
