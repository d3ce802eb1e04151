"""Standard errors and paired tests, against their definitions."""

from math import atan, comb, pi, sqrt

import numpy as np
import pytest

from fedra_engine.studies.statistics import is_rising, mcnemar, paired_difference, standard_error


def test_the_standard_error_is_that_of_the_average_of_binomial_shares() -> None:
    accuracy, tests = {"art": 0.5, "photo": 0.8}, {"art": 100, "photo": 50}
    rng = np.random.default_rng(0)
    drawn = [rng.binomial(tests[domain], accuracy[domain], 200_000) / tests[domain] for domain in tests]
    assert standard_error(accuracy, tests) == pytest.approx(np.mean(drawn, axis=0).std(), rel=0.01)
    assert standard_error(accuracy, tests) == pytest.approx(sqrt(0.25 / 100 + 0.16 / 50) / 2)


def test_mcnemar_counts_the_samples_on_which_only_one_is_right() -> None:
    first, second = "1110000110", "1001111110"
    #                 ^^   differ: only the first at 1 and 2, only the second at 3, 4, 5 and 6
    found = mcnemar(first, second)
    assert found[:2] == (2, 4)
    assert found.p == pytest.approx(2 * sum(comb(6, k) for k in (0, 1, 2)) / 2**6)
    assert mcnemar(second, first) == (4, 2, found.p)


@pytest.mark.parametrize(
    ("first", "second", "p"), [("1010", "1010", 1.0), ("1100", "0011", 1.0), ("11111", "0" * 5, 1 / 16)]
)
def test_mcnemar_of_few_samples(first: str, second: str, p: float) -> None:
    assert mcnemar(first, second).p == pytest.approx(p)


def test_the_paired_difference_is_that_of_pairs() -> None:
    """With one degree of freedom, t is distributed as Cauchy: p = 1 − 2 atan(t) / π."""
    found = paired_difference([0.5, 0.9], [0.4, 0.5])
    assert found is not None
    mean, error = 0.25, 0.15
    assert found == pytest.approx((mean, error, 1 - 2 * atan(mean / error) / pi))


@pytest.mark.parametrize("values", [[], [0.5], [0.5, 0.6, 0.7]])
def test_without_a_known_spread_there_is_no_test(values: list[float]) -> None:
    assert paired_difference(values, [value - 0.1 for value in values]) is None


@pytest.mark.parametrize(
    ("curve", "rising"),
    [
        ({0: 0.0, 75: 0.5, 100: 0.61}, True),
        ({0: 0.0, 75: 0.5, 100: 0.59}, False),
        # Not the one at 76, but the last within three quarters.
        ({0: 0.0, 50: 0.5, 76: 0.61, 100: 0.61}, True),
        ({0: 0.0, 50: 0.7, 100: 0.2}, False),
        ({0: 0.0, 76: 0.1, 100: 0.9}, None),
        ({0: 0.0}, None),
    ],
)
def test_a_curve_rises_by_more_than_the_error_after_that(curve: dict[int, float], rising: bool | None) -> None:
    assert is_rising(curve, 0.1) is rising
