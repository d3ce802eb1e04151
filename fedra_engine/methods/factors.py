"""Averages of the LoRA factors: of both, or of the one that is trained.

FedIT (Zhang et al., ICASSP 2024; arXiv 2305.05644): FedAvg on both LoRA factors.
A ← Σ_i p_i A_i and B ← Σ_i p_i B_i, with p_i in proportion to client i's samples (`method.weighting samples`), over
the clients that trained the block. The mean of the factors is not the factor of the mean product.

FFA-LoRA (Sun et al., ICLR 2024; arXiv 2403.12313): A stays at its random start, clients train B only.
With one A for all, Σ p_i B_i A = (Σ p_i B_i) A: the mean of the factors is exact, and half as much is uploaded.

RoLoRA (Chen et al., 2024; arXiv 2409.02346, algorithm 1): clients train one factor a round, B and A in turn.
In the first round and every other one, A is frozen and B is trained and averaged; in the rounds between, B is frozen.
With one frozen factor for all, the mean of the other gives the exact mean product. Beginning with A would teach
nothing: while B is zero, the gradient of A is zero.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fedra_engine.federation.assignment import Assignment
from fedra_engine.methods.base import register_method
from fedra_engine.methods.fedra import FedRA
from fedra_engine.models.adapters import Factor


@register_method("fedit")
class FedIT(FedRA):
    """Averages A and B separately."""


@register_method("ffalora")
class FFALora(FedRA):
    """Trains and averages B; A is frozen for ever."""

    def assign(self, participants: NDArray[np.int64], round: int) -> Assignment:
        return replace(super().assign(participants, round), factors="B")

    def downloaded_factors(self) -> Factor:
        # A is known from the seed.
        return "B"


@register_method("rolora")
class RoLoRA(FedRA):
    """Trains and averages B in even rounds (counted from 0), A in odd ones."""

    def assign(self, participants: NDArray[np.int64], round: int) -> Assignment:
        return replace(super().assign(participants, round), factors="B" if round % 2 == 0 else "A")
