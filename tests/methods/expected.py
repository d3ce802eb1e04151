"""What methods should make of random updates, in a few lines of NumPy."""

from __future__ import annotations

import numpy as np
import torch

from fedra_engine.models.state import GlobalState
from tests.methods.rounds import DEPTH, LAYOUT, RANK, Update, factors

RANKS = np.array([3, 1, 2, 3, 1, 2])
LATE_RANKS = np.array([2, 1, 2, 3, 1, 2])
"""No client of the highest rank can hold all blocks."""
FULL_RANKS = np.full(6, RANK)


def weighted_mean(pairs):
    """Σ w v / Σ w of (w, v)."""
    return sum(w * v for w, v in pairs) / sum(w for w, _ in pairs)


def weight(update: Update, weighting: str) -> float:
    return float(update.samples) if weighting == "samples" else 1.0


def mean_adapters(state: GlobalState, updates: list[Update], weighting: str) -> np.ndarray:
    expected = state.adapters.numpy().copy()
    for block in range(DEPTH):
        holders = [(weight(u, weighting), u.adapters[block].numpy()) for u in updates if block in u.adapters]
        if holders:
            expected[block] = weighted_mean(holders)
    return expected


def rank_means(state: GlobalState, updates: list[Update], ranks: np.ndarray, weighting: str) -> torch.Tensor:
    """Each rank's row of A and column of B as the mean over the clients that have it."""
    expected = state.adapters.clone()
    for block in range(DEPTH):
        for target, (a, b) in enumerate(factors(expected[block])):
            for rank in range(RANK):
                those = [u for u in updates if block in u.adapters and ranks[u.client] > rank]
                if those:
                    pairs = [(weight(u, weighting), factors(u.adapters[block])[target]) for u in those]
                    a[rank] = weighted_mean([(w, own_a[rank]) for w, (own_a, _) in pairs])
                    b[:, rank] = weighted_mean([(w, own_b[:, rank]) for w, (_, own_b) in pairs])
    return expected


def mean_products(updates: list[Update], block: int, weighting: str) -> list[np.ndarray]:
    holders = [u for u in updates if block in u.adapters]
    return [
        weighted_mean([(weight(u, weighting), np.matmul(*factors(u.adapters[block])[t][::-1])) for u in holders])
        for t in range(len(LAYOUT.targets))
    ]


def columns(factor: str) -> slice:
    return LAYOUT.columns(factor)
