"""Deterministic aggregation through the Triton kernel: exact sums, and so those of the torch path."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fedra_engine.federation.aggregation import Aggregator
from fedra_engine.federation.work import ClientUpdates
from fedra_engine.models.state import GlobalState
from fedra_kernels import dispatch
from tests.federation.updates import make_round

ALLOCATION = np.array([[1, 1, 0, 1, 0], [0, 1, 1, 1, 0], [1, 0, 1, 0, 0], [1, 1, 1, 1, 0], [0, 1, 0, 1, 0]], dtype=bool)


def results(previous: GlobalState, updates: list[ClientUpdates], weighting: str, portions: int = 1) -> list[Tensor]:
    """Sums and means when the updates come in turn to `portions` aggregators, which are then merged."""
    parts = [Aggregator(previous, weighting=weighting, deterministic=True) for _ in range(portions)]
    for position, update in enumerate(updates):
        parts[position % portions].add(update)
    for part in parts[1:]:
        for mine, theirs in zip(parts[0].sums(), part.sums(), strict=True):
            mine += theirs
    return [*parts[0].sums(), parts[0].result().adapters, parts[0].result().heads]


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize("weighting", ["uniform", "samples"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_deterministic_sums_are_the_torch_paths_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, weighting: str
) -> None:
    previous, updates = make_round(3, ALLOCATION, dtype)
    whole = results(previous, updates, weighting)
    assert equal(results(previous, updates[::-1], weighting), whole)
    assert equal(results(previous, updates[2:] + updates[:2], weighting, portions=3), whole)
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    assert equal(results(previous, updates, weighting), whole)
