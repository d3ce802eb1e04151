"""Names of classes, domains and clients, where samples are from, and names that users register."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Sequence
from decimal import Decimal
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from fedra_engine.config import register_choice
from fedra_engine.runtime.errors import InputError, first_few

_NUMBER = re.compile(r"[+-]?[0-9]{1,15}(\.[0-9]{0,10})?")
"""Texts with more digits are names."""
_LARGEST = 2**53
"""From here on, not every whole number is a float."""
_CHARACTERS = 80
_NAMES = 8
"""Characters of a value, and names, that a message shows."""
_Function = TypeVar("_Function", bound=Callable[..., object])


class SampleSource(NamedTuple):
    """A line of a file or a row of a split.

    Attributes:
        place: up to the number, `<file>, line` or `<split>, row`.
        number: of the line or row.
    """

    place: str
    number: int

    def __str__(self) -> str:
        return f"{self.place} {self.number}"


def sample_sources(sources: Iterable[SampleSource]) -> NDArray[np.void]:
    """Where each of many samples is from, in 16 bytes each: a structured array [samples] of `SampleSource`'s fields."""
    return np.fromiter(sources, dtype=[("place", object), ("number", np.int64)])


def is_missing(value: object) -> bool:
    """Whether a cell is empty: null, NaN, or no text but blanks. Words such as "NA" or "null" are texts."""
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def name_of(value: object, role: str, column: str, source: SampleSource) -> str:
    """The name of a domain, client or class (`role`) in `column`, without the blanks around it.

    Whole numbers are names, also as the floats that a column with missing values has.

    Raises:
        InputError: a value that is no name.
    """
    if isinstance(value, float) and value.is_integer() and abs(value) < _LARGEST:
        value = int(value)
    if is_missing(value) or isinstance(value, bool) or not isinstance(value, str | int):
        found = f"no {role}" if is_missing(value) else repr(value)[:_CHARACTERS]
        raise InputError(
            f"data.columns.{role}: {source}: found {found} in column {column!r}, expected a name or a whole number"
        )
    return str(value).strip()


def client_name(value: object, column: str, source: SampleSource) -> str:
    """A client's name in `column`; empty where the sample is nobody's.

    Raises:
        InputError: a value that is no name.
    """
    return "" if is_missing(value) else name_of(value, "client", column, source)


def class_name(value: object, column: str, source: SampleSource) -> str:
    """A class's name in `column`. Numbers are compared as such: 1, 1.0 and 01 are the same class, called 1.

    Raises:
        InputError: a value that is no name.
    """
    name = name_of(value, "label", column, source)
    if not _NUMBER.fullmatch(name):
        return name
    number = Decimal(name)
    return str(int(number)) if number == int(number) else f"{number.normalize():f}"


def labelled_split(
    labels: Iterable[tuple[str, Iterable[object] | None]], trained: Callable[[], Iterable[object]]
) -> tuple[str | None, list[str]]:
    """The first held-out split that tells its classes, as that of a challenge does not, and notes on those before it.

    Args:
        labels: name of every split and its labels; None where there is no such column.
        trained: the labels of the training split.

    Returns:
        The name of the split, and the notes. Where no split has labels, it is the first without such a column, so
        that reading it raises the error that names the column; None if all have one.
    """
    notes, lacking = list[str](), None
    for split, values in labels:
        if values is None:
            lacking = lacking or split
        elif _has_labels(values, trained):
            return split, notes
        notes.append(f"{split}: its samples have no labels, so it is not used")
    return lacking, notes


def _has_labels(labels: Iterable[object], trained: Callable[[], Iterable[object]]) -> bool:
    """Whether any is neither missing nor, unless the training split has that class, -1."""
    minus_one = False
    for minus_one in (_is_minus_one(label) for label in labels if not is_missing(label)):
        if not minus_one:
            return True
    return minus_one and any(map(_is_minus_one, trained()))


def _is_minus_one(label: object) -> bool:
    return str(label).strip() in ("-1", "-1.0")


def listed(names: Collection[str]) -> str:
    """The first of `names`, for a message, and how many others there are.

    Where accents are characters of their own, these are escaped: the name looks as if they were not.
    """
    shortened = (name[:_CHARACTERS] for name in names)
    quoted = [repr(name) if unicodedata.is_normalized("NFC", name) else ascii(name) for name in shortened]
    return first_few(quoted, _NAMES)


def encode_names(names: Sequence[str]) -> tuple[NDArray[np.int64], list[str]]:
    """Indices [samples] of `names` into the sorted names, and these: numbers by their value, then all others."""

    def key(name: str) -> tuple[bool, Decimal, str]:
        is_number = _NUMBER.fullmatch(name) is not None
        return not is_number, Decimal(name if is_number else 0), name

    unique = sorted(set(names), key=key)
    index_of = {name: index for index, name in enumerate(unique)}
    return np.array([index_of[name] for name in names], dtype=np.int64), unique


def registering(table: dict[str, _Function], name: str, decorator: str, field: str) -> Callable[[_Function], _Function]:
    """A `decorator` that makes a function what `field` means by `name`, which `table` does not have yet.

    Raises:
        InputError: the name is taken.
    """
    if name in table:
        raise InputError(f"{decorator}: found {name!r} registered already, expected a name other than {listed(table)}")

    def register(function: _Function) -> _Function:
        table[name] = function
        register_choice(field, name)
        return function

    return register
