"""Names of classes, domains and clients, and their indices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedra_engine.data.origins import Origin
from fedra_engine.errors import InputError

_MOST_DIGITS = 19
"""Texts with more digits are names; Python refuses to make numbers of very many."""


def encode_names(values: Sequence[Any], where: Callable[[int], str]) -> tuple[NDArray[np.int64], list[str]]:
    """Indices of `values` (texts or whole numbers), and the sorted names they stand for.

    Whole numbers, also in a text file, are sorted as numbers. Blanks around a name do not belong to it.

    Args:
        values: [samples].
        where: describes where sample i is, for the error.

    Returns:
        int64 [samples] and the names.

    Raises:
        InputError: a value that is no name.
    """
    names = []
    for row, value in enumerate(values):
        name = str(value).strip()
        if isinstance(value, bool) or not isinstance(value, str | int) or not name:
            raise InputError(f"{where(row)}: found {value!r}, expected a name or a whole number")
        names.append(name)
    unique = sorted(set(names), key=_sort_key)
    index_of = {name: index for index, name in enumerate(unique)}
    return np.array([index_of[name] for name in names], dtype=np.int64), unique


def client_name(value: object, origin: Origin) -> str:
    """A client's name, without the blanks around it; empty where there is none.

    Raises:
        InputError: a value that is no name.
    """
    if isinstance(value, bool) or not isinstance(value, str | int | None):
        raise InputError(f"data.columns.client: {origin}: found {value!r}, expected a name or a whole number")
    return "" if value is None else str(value).strip()


def _sort_key(name: str) -> tuple[bool, int, str]:
    digits = name.removeprefix("-")
    is_number = digits.isascii() and digits.isdigit() and len(digits) < _MOST_DIGITS
    return not is_number, int(name) if is_number else 0, name
