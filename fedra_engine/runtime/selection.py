"""A few of many values, for a line of a chart or of a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

Value = TypeVar("Value")


def some_of(values: Sequence[Value], most: int) -> Sequence[Value]:
    """At most `most` of the `values`, but one at least, evenly spread; the last one always, with two the first, too."""
    if len(values) <= max(most, 1):
        return values
    if most <= 1:
        return values[-1:]
    step = (len(values) - 1) / (most - 1)
    return [values[round(place * step)] for place in range(most)]
