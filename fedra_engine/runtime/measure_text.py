"""Measures as people read them: shares in percent with one decimal, other measures with four significant digits.

Files have unrounded numbers, shares from 0 to 1.
"""

from __future__ import annotations

import math

SHARES = {"accuracy", "macro_f1", "calibration_error"}
"""Measures from 0 to 1 that are read in percent."""
_WORDS = {"macro_f1": "macro-F1", "calibration_error": "calibration error"}
"""Measures whose names are not their words."""
_NOT_DEFINED = "–"


def register_share(name: str) -> None:
    """Have the measure `name` read in percent from now on."""
    SHARES.add(name)


def is_share(name: str) -> bool:
    """Whether the measure `name` is read in percent."""
    return name in SHARES


def measure_name(name: str, held_out: str = "test") -> str:
    """A measure's name in words; those that users register have none but their own.

    The loss is named after the samples it is of, `held_out`: `test loss`, `validation loss`.
    """
    return f"{held_out} loss" if name == "test_loss" else _WORDS.get(name, name)


def measure_title(name: str, held_out: str = "test") -> str:
    """The title of a row of `measure_number`s: `macro-F1 (%)`, `test loss`."""
    return f"{measure_name(name, held_out)} (%)" if is_share(name) else measure_name(name, held_out)


def measure_number(name: str, value: float | None) -> str:
    """A value of the measure `name` without its unit: `39.7`, `1.486`; a dash where it is not defined."""
    if is_share(name):
        return percent_number(value)
    if value is None or math.isnan(value):
        return _NOT_DEFINED
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.4g}"


def measure_text(name: str, value: float | None) -> str:
    """A value of the measure `name`: `39.7 %`, `1.486`; a dash where it is not defined."""
    unit = " %" if is_share(name) and not _is_undefined(value) else ""
    return f"{measure_number(name, value)}{unit}"


def change_text(name: str, before: float | None, after: float | None) -> str:
    """A measure's values before and after, as in `39.7 → 60.8 %`; a dash where one is not defined."""
    if _is_undefined(after):
        return f"{measure_text(name, before)} → {_NOT_DEFINED}"
    return f"{measure_number(name, before)} → {measure_text(name, after)}"


def percent_number(share: float | None) -> str:
    """A share, of whatever it may be, in percent without the unit: `39.7`; a dash where it is not defined."""
    return _NOT_DEFINED if share is None or math.isnan(share) else f"{100 * share:.1f}"


def percent(share: float) -> str:
    """`39.7 %`, of an accuracy."""
    return measure_text("accuracy", share)


def _is_undefined(value: float | None) -> bool:
    return value is None or math.isnan(value)
