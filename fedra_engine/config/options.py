"""Declarations of configuration fields: the values that a field may have, and the settings under which it matters."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fedra_engine.runtime.errors import InputError

Entry = TypeVar("Entry")

Need = Mapping[str, Sequence[Any]]
"""Values by field name; met if any of the fields has one of its values.

A name without a dot is a field of the same group; the others are names from the root.
"""

IN_MEMORY = "in-memory"
"""Stands in a configuration for a path or partition that was passed from Python."""

SOMETHING = object()
"""In a `Need`: any value but null and an empty list."""


@dataclass(frozen=True)
class Allowed:
    """Values that a field, or each entry of a list or mapping, may have, with a description for help and messages."""

    description: str
    contains: Callable[[Any], bool]


CHOICES: dict[str, Choice] = {}
"""By name of the field."""


class Choice:
    """Names that a field may have, in place of an `Allowed`; `registered` are those that `register_choice` added."""

    def __init__(self, field: str, *names: str) -> None:
        self.names, self.registered = [*names], list[str]()
        CHOICES[field] = self

    @property
    def shipped(self) -> list[str]:
        """The names that nobody had to register."""
        return [name for name in self.names if name not in self.registered]

    @property
    def description(self) -> str:
        """All names, for help and messages."""
        return f"one of {', '.join(self.names)}"

    def contains(self, value: Any) -> bool:
        """Whether `value` is one of the names."""
        return value in self.names


def register_choice(field: str, name: str) -> None:
    """Let a field (one of `CHOICES`) also be `name`; with `early_stopping.measure` also `keep_best`."""
    if name not in CHOICES[field].names:
        CHOICES[field].names.append(name)
        CHOICES[field].registered.append(name)


def registering(table: dict[str, Any], field: str, name: str) -> Callable[[Entry], Entry]:
    """A decorator that adds to the `table` of a field's values, so that the field may also be `name`."""
    if name in table:
        raise InputError(f"{field}: found a second {name} to register, expected a name that is not taken")

    def register(entry: Entry) -> Entry:
        table[name] = entry
        register_choice(field, name)
        return entry

    return register


def option(default: Any, allowed: Allowed | Choice | None = None, *, needs: Sequence[Need] = ()) -> Any:
    """A dataclass field.

    Args:
        default: the value if none is given; a list or mapping is copied.
        allowed: the values it may have, beside null where the field's type has None.
        needs: unless all are met, the field does nothing, and only its default is accepted.
    """
    metadata = {"allowed": allowed, "needs": tuple(needs)}
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def group(of: type[Any], *, needs: Sequence[Need] = ()) -> Any:
    """A dataclass field that is a dataclass, all of whose fields have the `needs`."""
    return field(default_factory=of, metadata={"allowed": None, "needs": tuple(needs)})


def whole(least: int, most: int) -> Allowed:
    """Whole numbers."""
    # True is an int, too.
    return Allowed(f"a whole number from {least:,} to {most:,}", lambda v: type(v) is int and least <= v <= most)


def number(least: float, most: float, *, above: bool = False, below: bool = False) -> Allowed:
    """Numbers; `above` excludes the least, `below` the most."""
    if above:
        description = f"a number above {least:,g} and {'below' if below else 'at most'} {most:,g}"
    else:
        description = f"a number from {least:,g} to {'below ' if below else ''}{most:,g}"

    def contains(value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return False
        return (least < value if above else least <= value) and (value < most if below else value <= most)

    return Allowed(description, contains)


def _text(description: str, contains: Callable[[str], bool], *, lines: bool = False) -> Allowed:
    """Texts without control characters, which would spoil messages; with `lines`, line breaks and tabs are allowed."""

    def check(value: Any) -> bool:
        if not isinstance(value, str):
            return False
        visible = value.replace("\n", "").replace("\t", "") if lines else value
        return visible.isprintable() and contains(value)

    return Allowed(f"{description}, without control characters", check)


def _bytes(text: str) -> int:
    return len(text.encode(errors="replace"))


TEXT = _text("text of 1 to 1,000 characters", lambda value: 0 < len(value) <= 1000)
LINES = _text("text of at most 100,000 characters", lambda value: len(value) <= 100_000, lines=True)
PATH = _text(
    "a path (names of at most 255 bytes, 1,000 in all; ~ in front only for the home of a user that there is)",
    lambda value: 0 < _bytes(value) <= 1000 and max(map(_bytes, value.split("/"))) <= 255 and not value.startswith("~"),
)
FOLDER_NAME = _text(
    "the name of one folder in output_dir (1 to 200 bytes, no slash, no dot or ~ in front)",
    lambda value: (
        0 < _bytes(value) <= 200 and bool(value.strip()) and "/" not in value and not value.startswith((".", "~"))
    ),
)

COUNT = whole(1, 10**9)
NATURAL = whole(0, 2**63 - 1)
SAMPLES = whole(1, 10**7)
CLIENTS = whole(1, 10**7)
STEPS = whole(1, 10**5)
PIXELS = whole(1, 4096)
RANK = whole(1, 128)
"""The kernels keep no larger one on chip."""
MAP_RANK = whole(0, 128)
_TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")
TRACKER = Allowed(f"one of {', '.join(_TRACKERS)}", _TRACKERS.__contains__)
POSITIVE = number(0, 1e12, above=True)
NON_NEGATIVE = number(0, 1e6)
RATE = number(0, 1e4, above=True)
"""Learning rates and other step sizes."""
SPREAD = number(0, 10)
"""Standard deviations of logarithms: beyond, exp overflows."""
FRACTION = number(0, 1, above=True, below=True)
ABOVE_ZERO_TO_ONE = number(0, 1, above=True)
PROBABILITY = number(0, 1)
BELOW_ONE = number(0, 1, below=True)
LONGEST_LIST = 10_000
"""Entries of any list."""
