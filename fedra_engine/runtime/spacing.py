"""A few of many values, evenly spaced, for a line of a chart or of a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

Value = TypeVar("Value")


def evenly_spaced(values: Sequence[Value], most: int) -> Sequence[Value]:
    """At most `most` of `values`, evenly spaced, with the first and the last (the last alone if `most` is below 2)."""
    if len(values) <= max(most, 1):
        return values
    if most <= 1:
        return values[-1:]
    step = (len(values) - 1) / (most - 1)
    return [values[round(place * step)] for place in range(most)]
