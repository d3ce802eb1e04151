"""Where samples are from: for messages, and as names of what is preprocessed."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import NamedTuple, overload

import numpy as np
from numpy.typing import NDArray


class Origin(NamedTuple):
    """A line of a file or a row of a split.

    Attributes:
        place: up to the number, `<file>, line` or `<split>, row`.
        number: of the line or row.
    """

    place: str
    number: int

    def __str__(self) -> str:
        return f"{self.place} {self.number}"


class Origins(Sequence[Origin]):
    """The origins of many samples, in 12 bytes each."""

    def __init__(self, places: Sequence[str], place_of: NDArray[np.int32], numbers: NDArray[np.int64]) -> None:
        """Sample i is from `places[place_of[i]]` number `numbers[i]`."""
        self._places = places
        self._place_of = place_of
        self._numbers = numbers

    @classmethod
    def of(cls, origins: Iterable[Origin]) -> Origins:
        """Those of `origins`."""
        index_of: dict[str, int] = {}
        place_of, numbers = array("i"), array("q")
        for place, number in origins:
            place_of.append(index_of.setdefault(place, len(index_of)))
            numbers.append(number)
        return cls(list(index_of), np.array(place_of, dtype=np.int32), np.array(numbers, dtype=np.int64))

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, row: int) -> Origin: ...

    @overload
    def __getitem__(self, row: slice) -> Origins: ...

    def __getitem__(self, row: int | slice) -> Origin | Origins:
        if isinstance(row, slice):
            return Origins(self._places, self._place_of[row], self._numbers[row])
        return Origin(self._places[self._place_of[row]], int(self._numbers[row]))

    def select(self, rows: NDArray[np.int64]) -> Origins:
        """The origins of the samples `rows`."""
        return Origins(self._places, self._place_of[rows], self._numbers[rows])
