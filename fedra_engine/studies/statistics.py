"""How sure the figures of a comparison are: standard errors, and two paired tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
from statistics import mean, stdev
from typing import NamedTuple


class McNemar(NamedTuple):
    """McNemar's exact test of two classifiers on the same samples.

    Attributes:
        only_first, only_second: samples that only this one predicts correctly.
        p: probability of counts at least as uneven if either were equally likely to be the one that is right.
    """

    only_first: int
    only_second: int
    p: float


class PairedDifference(NamedTuple):
    """The mean of paired differences, its standard error, and the p-value of the paired t-test (two-sided)."""

    mean: float
    error: float
    p: float


def standard_error(accuracy: Mapping[str, float], tests: Mapping[str, int]) -> float:
    """Standard error of the average over domains, each of whose accuracies is binomial on its number of `tests`."""
    variances = [value * (1 - value) / tests[domain] for domain, value in accuracy.items()]
    return sqrt(sum(variances)) / len(variances)


def mcnemar(first: str, second: str) -> McNemar:
    """Compare two classifiers by whether they are right: a character for each sample, `1` for a correct prediction."""
    from scipy.stats import binomtest

    pairs = list(zip(first, second, strict=True))
    only_first, only_second = pairs.count(("1", "0")), pairs.count(("0", "1"))
    different = only_first + only_second
    return McNemar(only_first, only_second, float(binomtest(only_first, different).pvalue) if different else 1.0)


def paired_difference(values: Sequence[float], others: Sequence[float]) -> PairedDifference | None:
    """The difference of `values` and `others`; None with fewer than two pairs, or if all differ by the same."""
    from scipy.stats import ttest_rel

    differences = [value - other for value, other in zip(values, others, strict=True)]
    if len(differences) < 2 or max(differences) - min(differences) < 1e-12:
        return None
    error = stdev(differences) / sqrt(len(differences))
    return PairedDifference(mean(differences), error, float(ttest_rel(values, others).pvalue))


def is_rising(curve: Mapping[int, float], error: float) -> bool | None:
    """Whether a `curve`, values by number of rounds, rises by more than `error` over the last quarter of its rounds.

    Its last value is compared with the last one within the first three quarters; None if there is none after round 0.
    """
    last = max(curve)
    before = max((rounds for rounds in curve if 0 < rounds <= 0.75 * last), default=None)
    return None if before is None else curve[last] - curve[before] > error
