"""RoLoRA (Chen et al., 2024; arXiv 2409.02346, algorithm 1): clients train one factor a round, B and A in turn.

In the first round and every other one, A is frozen and B is trained and averaged; in the rounds between, B is frozen.
With one frozen factor for all, the mean of the other gives the exact mean product. Beginning with A would teach
nothing: while B is zero, the gradient of A is zero.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fedra_engine.federation.assignment import Assignment
from fedra_engine.methods.allocated import AllocatedMethod


class RoLoRA(AllocatedMethod):
    """Trains and averages B in even rounds (counted from 0), A in odd ones."""

    def assign(self, participants: NDArray[np.int64], round: int) -> Assignment:
        """See `Method.assign`."""
        return replace(super().assign(participants, round), factors="B" if round % 2 == 0 else "A")
