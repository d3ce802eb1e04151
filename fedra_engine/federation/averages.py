"""Means over the domains, and the values of measures as JSON has them; without torch, for all that reads records."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import mean
from typing import Any


def average(of_domain: Mapping[str, float | None]) -> float:
    """Mean over the domains; NaN if a value is None, or there are no values."""
    if not of_domain:
        return math.nan
    return mean(math.nan if value is None else value for value in of_domain.values())


def average_measure(record: Mapping[str, Any], measure: str) -> float | None:
    """The mean of a measure over the domains in a `record` of `metrics.jsonl`.

    NaN if it is not defined for all of them; None if the round was not evaluated, or the measure is not in the record.
    """
    of_domain = record.get(measure)
    return None if of_domain is None else average(of_domain)


def finite(value: float) -> float | None:
    """None in the place of infinity and NaN, which JSON does not have."""
    return value if math.isfinite(value) else None


def finite_values(of_domain: Mapping[str, float]) -> dict[str, float | None]:
    """`finite` values by domain."""
    return {domain: finite(value) for domain, value in of_domain.items()}
