"""A measure has one text, wherever people read it."""

import math

import pytest

from fedra_engine.runtime.measure_text import change_text, measure_text, measure_title


@pytest.mark.parametrize(
    ("name", "before", "after", "text"),
    [
        ("calibration_error", 0.125, 0.0625, "12.5 → 6.2 %"),
        ("test_loss", 2.0, 0.12345, "2.000 → 0.1235"),
        ("perplexity", 12345.6, 31.4159, "12,346 → 31.42"),
        ("accuracy", None, 0.5, "– → 50.0 %"),
    ],
)
def test_measures_have_few_digits(name: str, before: float | None, after: float, text: str) -> None:
    assert change_text(name, before, after) == text
    assert measure_text(name, after) == text.partition(" → ")[2]


def test_what_is_not_defined_is_a_dash() -> None:
    assert [measure_text(name, math.nan) for name in ("macro_f1", "test_loss")] == ["–", "–"]


def test_only_a_share_has_its_unit_in_the_title() -> None:
    titles = [measure_title(name) for name in ("macro_f1", "test_loss", "one_of_mine")]
    assert titles == ["macro-F1 (%)", "test loss", "one_of_mine"]
