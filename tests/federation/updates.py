"""Random updates of a round's clients, and their deterministic aggregation."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fedra_engine.federation.aggregation import Aggregator, Averaging
from fedra_engine.federation.updates import ClientUpdates
from fedra_engine.models.state import GlobalState

BLOCKS, SIZE, HEAD = 5, 6, 4
ALLOCATION = np.array([[1, 1, 0, 1, 0], [0, 1, 1, 1, 0], [1, 0, 1, 0, 0], [1, 1, 1, 1, 0], [0, 1, 0, 1, 0]], dtype=bool)
"""Which of five clients holds which block; nobody holds the last."""


def make_updates(rng: np.random.Generator, client: int, blocks: np.ndarray, dtype: torch.dtype) -> ClientUpdates:
    """One client's update, in banks with rows that belong to nobody."""
    slots = rng.permutation(len(blocks) + 2)[: len(blocks)]
    return ClientUpdates(
        clients=np.array([client]),
        samples=rng.integers(1, 500, size=1),
        processed=np.array([1]),
        losses=torch.zeros(1, dtype=torch.float64),
        adapters=torch.from_numpy(rng.normal(size=(len(blocks) + 2, SIZE))).to(dtype),
        slots=torch.from_numpy(slots),
        slot_owners=np.zeros(len(blocks), dtype=np.int64),
        slot_blocks=blocks,
        heads=torch.from_numpy(rng.normal(size=(3, HEAD))).to(dtype),
        head_rows=torch.from_numpy(rng.integers(0, 3, size=1)),
        head_owners=np.zeros(1, dtype=np.int64),
        head_exits=np.zeros(1, dtype=np.int64),
        norms=torch.ones(1, dtype=torch.float64),
    )


def make_round(
    seed: int, allocation: np.ndarray, dtype: torch.dtype = torch.float64
) -> tuple[GlobalState, list[ClientUpdates]]:
    rng = np.random.default_rng(seed)
    adapters, head = (torch.from_numpy(rng.normal(size=size)).to(dtype) for size in ((BLOCKS, SIZE), HEAD))
    previous = GlobalState(adapters, head[None])
    return previous, [make_updates(rng, client, np.flatnonzero(row), dtype) for client, row in enumerate(allocation)]


def deterministic_results(
    previous: GlobalState, updates: list[ClientUpdates], weighting: str, portions: int = 1
) -> list[Tensor]:
    """Sums and means when the updates come in turn to `portions` aggregators, which are then merged."""
    parts = [Aggregator(previous, Averaging(weighting, deterministic=True)) for _ in range(portions)]
    for position, update in enumerate(updates):
        parts[position % portions].add(update)
    for part in parts[1:]:
        for mine, theirs in zip(parts[0].sums(), part.sums(), strict=True):
            mine += theirs
    return [*parts[0].sums(), parts[0].result().adapters, parts[0].result().heads]
