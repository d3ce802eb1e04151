"""Whether contestants have done the same work: the change of the global state in one round is compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.peers.work import State

LARGEST_DIFFERENCE = 0.001
"""Of changes in float32: norm of the difference by norm of the reference."""
SMALLEST_COSINE, LARGEST_DIFFERENCE_IN_BFLOAT16 = 0.995, 0.1
"""Of a change in bfloat16 and the reference in float32: both their direction and their size must agree."""
_ROUNDING = 5e-4
"""Of a mean: adding 10,000 float32 values one after another may err by 3e-4 of it."""


@dataclass(frozen=True)
class Agreement:
    """How a contestant's change compares with the reference's.

    Attributes:
        difference: norm of the difference of the changes, by the norm of the reference's change.
        cosine: of the two changes.
        holds: whether the contestant has done the same work.
    """

    difference: float
    cosine: float
    holds: bool


def worst_of(checks: Sequence[Agreement]) -> Agreement | None:
    """The one that does not hold, or is farthest from the reference; None of none."""
    return max(checks, key=lambda check: (not check.holds, check.difference), default=None)


def compare(initial: State, reference: State, found: State, dtype: str) -> Agreement:
    """Compare the state `found` after a round with the `reference` after the same round from `initial`."""
    if found.keys() != initial.keys():
        return Agreement(float("inf"), 0.0, False)
    wanted, got = _change(initial, reference), _change(initial, found)
    difference = float((got - wanted).norm() / wanted.norm())
    cosine = float(got @ wanted / (got.norm() * wanted.norm()))
    if dtype == "float32":
        return Agreement(difference, cosine, difference <= LARGEST_DIFFERENCE)
    return Agreement(difference, cosine, cosine >= SMALLEST_COSINE and difference <= LARGEST_DIFFERENCE_IN_BFLOAT16)


def unchanged(initial: State, found: State) -> Agreement:
    """Check that a round without steps has left the state as it was, up to the rounding of a mean."""
    if found.keys() != initial.keys():
        return Agreement(float("inf"), 0.0, False)
    change = _change(initial, found).norm()
    difference = float(change / torch.cat([value.double().flatten() for value in initial.values()]).norm())
    return Agreement(difference, 1.0, difference <= _ROUNDING)


def _change(initial: State, state: State) -> Tensor:
    """float64 [parameters]."""
    return torch.cat([(state[name].double() - value.double()).flatten() for name, value in initial.items()])
