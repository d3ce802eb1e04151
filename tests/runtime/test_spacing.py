"""Of many values, a few are taken that are spread evenly."""

from __future__ import annotations

import pytest

from fedra_engine.runtime.spacing import evenly_spaced


@pytest.mark.parametrize(("count", "most"), [(0, 3), (3, 3), (100, 8), (5, 4), (9, 1), (9, -2)])
def test_what_has_no_room_is_left_out_but_never_the_last(count: int, most: int) -> None:
    kept = evenly_spaced(range(count), most)
    assert len(kept) == min(count, max(most, 1))
    assert list(kept) == sorted(set(kept))
    assert [*kept][-1:] == [*range(count)][-1:]


def test_they_are_spread_from_the_first_to_the_last() -> None:
    assert evenly_spaced(range(1001), 5) == [0, 250, 500, 750, 1000]
    assert evenly_spaced(["a", "b"], 5) == ["a", "b"]
