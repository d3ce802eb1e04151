"""Methods that average LoRA factors: both of them, or the one that is trained.

FedIT (Zhang et al., ICASSP 2024; arXiv 2305.05644): FedAvg on both factors. A ← Σ_i p_i A_i and B ← Σ_i p_i B_i, with
p_i in proportion to client i's samples (`method.weighting samples`), over the clients that trained the block. The
product of these means is not the mean of the products.

FFA-LoRA (Sun et al., ICLR 2024; arXiv 2403.12313): A stays at its random start, clients train only B. As they share A,
Σ p_i B_i A = (Σ p_i B_i) A: the mean product is exact, and uploads are halved.

RoLoRA (Chen et al., 2024; arXiv 2409.02346, algorithm 1): clients train B in the first, third, … round and A in the
others; the mean product is exact for the same reason. It begins with B because A has no gradient while B is zero.
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
    """Trains A and B and averages each."""


@register_method("ffalora")
class FFALora(FedRA):
    """Trains and averages B; A is frozen."""

    def assign(self, participants: NDArray[np.int64], round: int) -> Assignment:
        return replace(super().assign(participants, round), factors="B")

    def downloaded_factors(self) -> Factor:
        # Clients can draw A from the seed.
        return "B"


@register_method("rolora")
class RoLoRA(FedRA):
    """Trains and averages B in even rounds (from 0), A in odd ones."""

    def assign(self, participants: NDArray[np.int64], round: int) -> Assignment:
        return replace(super().assign(participants, round), factors="B" if round % 2 == 0 else "A")
