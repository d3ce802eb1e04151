"""Vega-Lite: the JavaScript that draws charts in a page, their colours, and drawing them without a browser.

vl-convert is imported where it is used, as it brings a JavaScript engine of its own.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock

from fedra_engine.runtime.files import make_folders, write_whole

Spec = dict[str, Any]
"""A chart in Vega-Lite."""
FIGURE_WIDTH = 560
"""Pixels of a figure in a file; in a page, charts are as wide as there is room."""
_PIXELS_PER_INCH = 216
"""Of PNGs: three for every pixel of a figure."""


class Colours(NamedTuple):
    """Colours of charts: of text, grid lines and what has no data; of categories; from none to much."""

    text: str
    faint: str
    empty: str
    categories: tuple[str, ...]
    ramp: tuple[str, ...]


LIGHT = Colours(
    text="#1f2933",
    faint="#d9dee4",
    empty="#f3f5f7",
    categories=("#1f2933", "#2b6cb0", "#c05621", "#2f855a", "#97266d", "#6b46c1", "#8a6d00", "#0e7c86", "#b83232"),
    ramp=("#e3edf7", "#8fbadf", "#3b7fbd", "#123f6d"),
)
DARK = Colours(
    text="#e4e9ee",
    faint="#3a444f",
    empty="#1d242c",
    categories=("#e4e9ee", "#63a4e8", "#f0925a", "#5cc28d", "#e07bb8", "#a78bfa", "#d6b34a", "#4fc3cf", "#f07a7a"),
    ramp=("#22344a", "#2f6299", "#5fa3e0", "#d3e8fc"),
)


def theme(colours: Colours) -> Spec:
    """The `config` of Vega-Lite for charts in these colours, on whatever background the page has."""
    lines = {"domainColor": colours.faint, "tickColor": colours.faint, "gridColor": colours.faint}
    texts = {"labelColor": colours.text, "titleColor": colours.text, "labelFontSize": 11, "titleFontSize": 12}
    plain = {"titleFontWeight": "normal", "labelFontWeight": "normal"}
    return {
        "background": "transparent",
        "font": "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif",
        "view": {"stroke": None},
        "axis": {**lines, **texts, **plain, "gridOpacity": 0.6, "labelLimit": 130, "labelSeparation": 5},
        "axisBand": {"grid": False, "domain": False, "ticks": False},
        "legend": {**texts, **plain, "orient": "bottom", "direction": "horizontal", "symbolLimit": 40},
        "range": {
            "category": list(colours.categories),
            "heatmap": list(colours.ramp),
            "ramp": list(colours.ramp),
            "ordinal": list(colours.ramp),
        },
        "mark": {"color": colours.categories[1]},
        "rule": {"color": colours.faint},
        "line": {"strokeJoin": "round", "strokeCap": "round"},
        "style": {
            "cells": {"fill": colours.empty},
            "moment": {"stroke": colours.text, "strokeDash": [5, 4], "strokeWidth": 1.5},
        },
        "scale": {"rectBandPaddingInner": 0.05},
    }


def javascript() -> str:
    """Vega, Vega-Lite and Vega-Embed as a script, which makes `vegaEmbed` global.

    Bundling takes seconds, so it is kept in the user's cache.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fedra_engine"
    file = folder / f"vega-{metadata.version('vl-convert-python')}.js"
    with suppress(OSError):
        return file.read_text(encoding="utf-8")
    import vl_convert

    script = vl_convert.javascript_bundle("Object.assign(window, {vegaEmbed});")
    # A cache that cannot be written costs these seconds again, and nothing else.
    with suppress(OSError):
        make_folders(folder)
        # Several runs may end at the same time.
        with FileLock(f"{file}.lock"):
            write_whole(file, script)
    return script


def svg(spec: Mapping[str, Any]) -> str:
    """The chart as SVG, in light colours."""
    import vl_convert

    text: str = vl_convert.vegalite_to_svg(_with_width(spec), config=_on_white())
    return text


def png(spec: Mapping[str, Any]) -> bytes:
    """The chart as PNG, in light colours."""
    import vl_convert

    content: bytes = vl_convert.vegalite_to_png(_with_width(spec), config=_on_white(), scale=1, ppi=_PIXELS_PER_INCH)
    return content


def _on_white() -> Spec:
    return theme(LIGHT) | {"background": "white", "font": "Liberation Sans, Arial, Helvetica, sans-serif"}


def _with_width(spec: Mapping[str, Any]) -> Spec:
    """The chart with a width in pixels in place of that of its container in a page."""
    return {**spec, "width": FIGURE_WIDTH} if spec.get("width") == "container" else dict(spec)
