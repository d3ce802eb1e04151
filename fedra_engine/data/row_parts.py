"""Cut the samples of a source into parts, and have each part's rows made or found in the cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np

from fedra_engine.data.domain_data import DomainData
from fedra_engine.data.row_cache import FORMAT, Part, cached_parts
from fedra_engine.runtime.errors import InputError
from fedra_engine.runtime.files import content_hash
from fedra_engine.runtime.stages import Stage

PART_BYTES = 128 * 2**20
"""Most bytes of a part: what an interrupted run loses at most, and what is in memory while rows are made."""


class RowMaker(Protocol):
    """Makes rows of fixed shape from samples.

    Attributes:
        what: what it does, for people.
        readable: what it can make rows of, for people.
        shapes: shape of a row of each column.
        row_bytes: size of a row.
    """

    what: str
    readable: str
    shapes: dict[str, tuple[int, ...]]
    row_bytes: int

    def identity(self, start: int, stop: int) -> str | None:
        """All that decides the rows of samples start…stop-1; None where nothing on disk stands for them."""
        ...

    def make(self, start: int, stop: int, done: Callable[[int], object]) -> Part:
        """The rows of samples start…stop-1; `done` learns how many more of them are there, from time to time."""
        ...

    def describe(self, row: int) -> str:
        """Where sample `row` is from."""
        ...


@dataclass(frozen=True)
class MadeRows:
    """All rows of a source in order.

    Attributes:
        parts: the rows.
        skipped: a note, for people, on each of those that could not be made.
        made: how many were made now and put into the cache, where the others were; None where none is cached.
    """

    parts: list[Part]
    skipped: dict[int, str]
    made: int | None


def make_rows(data: DomainData, maker: RowMaker, *, skip: bool) -> MadeRows:
    """Every sample's row, made or found in the cache.

    Raises:
        InputError: a sample of which no row can be made, unless `skip`.
    """
    bounds = _cut(data, maker)
    skipped: dict[int, str] = {}
    made = 0
    making: set[int] = set()

    def check(index: int, part: Part) -> None:
        for offset, error in enumerate(part.errors):
            if error:
                row = bounds[index][0] + offset
                if not skip:
                    raise InputError(
                        f"data.root: cannot read {maker.describe(row)}: {error}; expected {maker.readable}, or "
                        "data.unreadable skip"
                    )
                skipped[row] = f"{maker.describe(row)}: skipped, {error}"

    def make(index: int) -> Part:
        nonlocal made
        making.add(index)
        part = maker.make(*bounds[index], stage.advance)
        made += len(part.errors)
        return part

    def found(index: int) -> None:
        if index not in making:
            stage.advance(bounds[index][1] - bounds[index][0])

    with Stage("looking for samples in the cache"):
        keys = _keys(maker, bounds)
    with Stage(maker.what, len(data)) as stage:
        if keys is not None:
            parts = cached_parts(keys, make, maker.shapes, check, found)
        else:
            parts = [make(index) for index in range(len(bounds))]
            for index, part in enumerate(parts):
                check(index, part)
    return MadeRows(parts, skipped, None if keys is None else made)


def _cut(data: DomainData, maker: RowMaker) -> list[tuple[int, int]]:
    """First and last + 1 sample of every part; a part has samples of one domain, so that others may do without it."""
    longest = max(PART_BYTES // maker.row_bytes, 1)
    changes = np.flatnonzero(np.diff(data.domain_of)) + 1
    ends = [0, *changes.tolist(), len(data)]
    return [(start, min(start + longest, end)) for begin, end in pairwise(ends) for start in range(begin, end, longest)]


def _keys(maker: RowMaker, bounds: list[tuple[int, int]]) -> list[str] | None:
    """A digest of all that decides each part; None where rows are not cached."""
    identities = [maker.identity(start, stop) for start, stop in bounds]
    known = [identity for identity in identities if identity is not None]
    if len(known) < len(identities):
        return None
    return [content_hash(f"{FORMAT} {identity}".encode()).hexdigest() for identity in known]
