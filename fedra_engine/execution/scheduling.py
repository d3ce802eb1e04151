"""The order in which clients are trained."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedra_engine.federation.allocation import Allocation


def longest_first(allocation: Allocation, steps: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows of `allocation` [participants, blocks] by falling cost, blocks × local steps; ties in row order.

    With the long ones first, the lanes of the last wave end close together (longest processing time rule).
    """
    return np.argsort(-allocation.sum(axis=1) * steps, kind="stable")
