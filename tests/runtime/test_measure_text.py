"""A measure has one text, wherever people read it."""

import math

import pytest

from fedra_engine.execution.metrics import register_metric
from fedra_engine.runtime.measure_text import change_text, measure_text, measure_title


@pytest.mark.parametrize(
    ("name", "before", "after", "text"),
    [
        ("calibration_error", 0.125, 0.0625, "12.5 → 6.2 %"),
        ("test_loss", 2.0, 0.12345, "2.000 → 0.1235"),
        ("perplexity", 12345.6, 31.4159, "12,346 → 31.42"),
        ("accuracy", None, 0.5, "– → 50.0 %"),
        ("accuracy", 0.5, None, "50.0 % → –"),
        ("accuracy", None, None, "– → –"),
        ("test_loss", None, math.nan, "– → –"),
    ],
)
def test_measures_have_few_digits(name: str, before: float | None, after: float | None, text: str) -> None:
    assert change_text(name, before, after) == text
    assert measure_text(name, after) == text.partition(" → ")[2]


def test_what_is_not_defined_is_a_dash() -> None:
    assert [measure_text(name, math.nan) for name in ("macro_f1", "test_loss")] == ["–", "–"]


def test_only_a_share_has_its_unit_in_the_title() -> None:
    titles = [measure_title(name) for name in ("macro_f1", "test_loss", "one_of_mine")]
    assert titles == ["macro-F1 (%)", "test loss", "one_of_mine"]


def test_a_loss_is_named_after_its_samples() -> None:
    assert measure_title("test_loss", "validation") == "validation loss"
    assert measure_title("macro_f1", "validation") == "macro-F1 (%)"


def test_a_metric_of_the_users_may_be_a_share(own_names: None) -> None:
    register_metric("mine", share=True)(lambda logits, labels: labels)
    register_metric("other")(lambda logits, labels: labels)
    assert [measure_text(name, 0.83333) for name in ("mine", "other")] == ["83.3 %", "0.8333"]
    assert measure_title("mine") == "mine (%)"
