"""Kinds of charts in Vega-Lite: lines over rounds, bars over blocks, heat maps. Colours come from `vega.theme`."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean
from typing import Any

from fedra_engine.report.facts import RoundFacts
from fedra_engine.report.vega import Spec

Rows = list[dict[str, Any]]
"""Data of a chart. Names of fields are short, as each cell of a heat map repeats them."""
MOST_CELLS = 2500
"""Of a heat map with texts for each cell: at most 400 kB of a page."""
MOST_POINTS = 600
"""Of a line over the rounds."""
FOUR_DIGITS = ",.4r"
"""How D3 writes a number with four significant digits, as `measure_text` does."""
_MOST_MARKED = 50
"""Places of a line that are marked."""
_MOST_TICKS = 20
"""Ticks that are all drawn; from there on, those that Vega chooses are at whole numbers."""
_LONGEST = 30
"""Characters of a name that is in many cells."""
_MOST_ON_SVG = 1500
"""Marks of a chart that a browser shows as SVG without delay; more are painted."""


@dataclass(frozen=True)
class Chart:
    """A chart of a report.

    Attributes:
        name: of its file, without an ending.
        title: what it shows, in a few words.
        note: what else one must know to read it.
        spec: in Vega-Lite.
        wide: whether it needs all of the page's width.
    """

    name: str
    title: str
    note: str
    spec: Spec
    wide: bool = False


def tip(field: str, title: str | None = None, **options: Any) -> Spec:
    """A line of what a chart shows under the pointer."""
    kind = "quantitative" if "format" in options else "nominal"
    return {"field": field, "title": title or field, "type": kind, **options}


def line_chart(
    rows: Rows,
    title: str,
    digits: str,
    names: Sequence[str] = (),
    strong: str | None = None,
    zero: bool = False,
    x: str = "round",
) -> Spec:
    """Lines of `value` over the whole numbers `x`, one for each of the `names` in `series`; a single one without names.

    Few points are marked, as one alone would be no line.

    Args:
        rows: the points.
        title: of the values.
        digits: how the tooltip writes a value, in D3's notation.
        names: of the lines, in the order of the legend, where a click shows one alone.
        strong: the line that is thicker than the others.
        zero: whether the axis of the values begins at zero; so it does where all are the same.
        x: the field of the other axis, and its title.
    """
    places, zero = {row[x] for row in rows}, zero or len({row["value"] for row in rows}) == 1
    encoding: Spec = {
        "x": {"field": x, "type": "quantitative", "title": x, "axis": _whole_axis(places), "scale": {"nice": False}},
        "y": {"field": "value", "type": "quantitative", "title": title, "scale": {"zero": zero}},
        "tooltip": [tip(x), *([tip("series", " ")] if names else []), tip("value", title, format=digits)],
    }
    point = {"size": 28} if len(places) <= _MOST_MARKED else False
    spec: Spec = {**_data(rows), "mark": {"type": "line", "point": point, "tooltip": True}}
    if names:
        spec["params"] = [{"name": "picked", "select": {"type": "point", "fields": ["series"]}, "bind": "legend"}]
        encoding["color"] = {"field": "series", "type": "nominal", "title": None, "scale": {"domain": list(names)}}
        encoding["opacity"] = {"condition": {"param": "picked", "value": 1}, "value": 0.12}
    if strong is not None:
        encoding["strokeWidth"] = {
            "condition": {"test": {"field": "series", "equal": strong}, "value": 4},
            "value": 1.6,
        }
    return {**spec, "width": "container", "height": 260, "encoding": encoding}


def _whole_axis(places: Collection[float]) -> Spec:
    """An axis with ticks at whole numbers alone; Vega's own ticks for a few rounds lie between them, too."""
    axis: Spec = {"tickMinStep": 1, "format": "d", "grid": False}
    first, last = math.floor(min(places, default=0)), math.ceil(max(places, default=0))
    return axis | ({"values": list(range(first, last + 1))} if last - first <= _MOST_TICKS else {})


def with_line_at(spec: Spec, round: int, text: str) -> Spec:
    """A `line_chart` with a vertical line at a round, which the `text` explains under the pointer."""
    inside = {name: value for name, value in spec.items() if name in ("mark", "params", "encoding")}
    line: Spec = {
        **_data([{"round": round, "about": text}]),
        "mark": {"type": "rule", "style": "moment"},
        "encoding": {"x": {"field": "round", "type": "quantitative"}, "tooltip": [tip("round"), tip("about", " ")]},
    }
    return {**{name: value for name, value in spec.items() if name not in inside}, "layer": [line, inside]}


def block_bars(values: Sequence[float], title: str, digits: str) -> Spec:
    """A bar for each block; `values` are [blocks]."""
    rows = [{"b": block, "v": value} for block, value in enumerate(values, 1)]
    return {
        **_data(rows),
        "width": "container",
        "height": 170,
        "mark": {"type": "bar", "cornerRadiusEnd": 2},
        "encoding": {
            "x": {"field": "b", "type": "ordinal", "title": "block", "axis": _BAND},
            "y": {"field": "v", "type": "quantitative", "title": title, "axis": {"tickCount": 4}},
            "tooltip": [tip("b", "block"), tip("v", title, format=digits)],
        },
    }


def heat_map(rows: Rows, x: Spec, y: Spec, color: Spec, tips: Sequence[Spec], *, height: int, lines: int) -> Spec:
    """A cell for each row of the data, of fields `x`, `y` and `v`; all as wide as there is room.

    Args:
        rows: the data.
        x, y, color: what Vega-Lite is told of them beside their fields.
        tips: what is shown under the pointer.
        height: most pixels of all `lines` together; few lines need less.
        lines: number of different `y`.
    """
    step = max(2, min(22, height // max(lines, 1)))
    return {
        **_data(rows),
        "width": "container",
        "height": step * lines,
        "view": {"style": "cells"},
        "mark": {"type": "rect"},
        "encoding": {
            "x": {"field": "x", "type": "ordinal", "sort": None, "axis": _BAND, **x},
            "y": {"field": "y", "type": "ordinal", "axis": {"labelOverlap": True}, **y},
            "color": {"field": "v", "type": "quantitative", **color},
            "tooltip": list(tips),
        },
    }


def thinned(
    rounds: Sequence[RoundFacts], value: Callable[[RoundFacts], float | None], most: int = MOST_POINTS
) -> Iterator[tuple[float, float]]:
    """Round and value, for a line of at most `most` points; of more rounds, the means over neighbours."""
    for _, group in binned(rounds, most):
        known = [(each.number, found) for each in group if (found := value(each)) is not None]
        if known:
            yield mean(number for number, _ in known), mean(found for _, found in known)


def binned(rounds: Sequence[RoundFacts], most: int) -> Iterator[tuple[str, Sequence[RoundFacts]]]:
    """At most `most` groups of neighbouring rounds, and their names, as in `5` or `5–8`."""
    size = -(-len(rounds) // max(most, 1)) or 1
    for first in range(0, len(rounds), size):
        group = rounds[first : first + size]
        yield runs_text([each.number for each in group]), group


def short(name: str) -> str:
    """The name without its end, if it is long."""
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"


def runs_text(numbers: Sequence[int]) -> str:
    """Ascending whole numbers in few characters: `1–4, 7`."""
    breaks = [place for place, (one, other) in enumerate(pairwise(numbers), 1) if other != one + 1]
    parts = (numbers[start:stop] for start, stop in pairwise([0, *breaks, len(numbers)]))
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}–{part[-1]}" for part in parts if part)


def _data(rows: Sequence[Mapping[str, Any]]) -> Spec:
    painted = {"usermeta": {"embedOptions": {"renderer": "canvas"}}} if len(rows) > _MOST_ON_SVG else {}
    return {"data": {"values": list(rows)}, **painted}


_BAND = {"labelAngle": 0, "labelOverlap": True}
