"""Measures as people read them, the same everywhere: shares in percent, other values with four digits.

Files have the numbers as they are.
"""

from __future__ import annotations

import math

SHARES = {"macro_f1": "macro-F1", "calibration_error": "calibration error"}
"""Measures beside the accuracy that are shares, from 0 to 1, by name, in words."""
_WORDS = {**SHARES, "test_loss": "test loss"}
"""Those whose names are not their words."""
_NOT_DEFINED = "–"


def measure_name(name: str) -> str:
    """A measure's name in words; those that users register have none but their own."""
    return _WORDS.get(name, name)


def measure_title(name: str) -> str:
    """The title of a row of `measure_number`s: `macro-F1 (%)`, `test loss`."""
    return f"{measure_name(name)}{' (%)' * _is_share(name)}"


def measure_number(name: str, value: float | None) -> str:
    """A value of the measure `name` without its unit: `39.7`, `1.486`; a dash where it is not defined."""
    if value is None or math.isnan(value):
        return _NOT_DEFINED
    if _is_share(name):
        return f"{100 * value:.1f}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.4g}"


def measure_text(name: str, value: float | None) -> str:
    """A value of the measure `name`: `39.7 %`, `1.486`; a dash where it is not defined."""
    return _with_unit(name, measure_number(name, value))


def change_text(name: str, before: float | None, after: float | None) -> str:
    """A measure's values before and after, as in `39.7 → 60.8 %`; a dash where one is not defined."""
    return _with_unit(name, f"{measure_number(name, before)} → {measure_number(name, after)}")


def percent(share: float) -> str:
    """`39.7 %`, of an accuracy."""
    return measure_text("accuracy", share)


def _is_share(name: str) -> bool:
    return name == "accuracy" or name in SHARES


def _with_unit(name: str, numbers: str) -> str:
    return f"{numbers} %" if _is_share(name) and numbers != _NOT_DEFINED else numbers
