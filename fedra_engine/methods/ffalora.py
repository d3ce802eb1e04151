"""FFA-LoRA (Sun et al., ICLR 2024; arXiv 2403.12313): A stays at its random start, clients train B only.

With one A for all, Σ p_i B_i A = (Σ p_i B_i) A: the mean of the factors is exact, and half as much is uploaded.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fedra_engine.federation.assignment import Assignment
from fedra_engine.methods.allocated import AllocatedMethod
from fedra_engine.models.adapters import Factor


class FFALora(AllocatedMethod):
    """Trains and averages B; A is frozen for ever."""

    def assign(self, participants: NDArray[np.int64], round: int) -> Assignment:
        """See `Method.assign`."""
        return replace(super().assign(participants, round), factors="B")

    def downloaded_factors(self) -> Factor:
        """See `Method.downloaded_factors`; A is known from the seed."""
        return "B"
