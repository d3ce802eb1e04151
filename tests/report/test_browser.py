"""A browser draws the page without a complaint, on a phone and on a desk, in light and in dark."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fedra_engine.report.page import read_page, write_report
from tests.report.browser import CHROMIUM, Browser, browser
from tests.report.run_folders import records, write_run

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
CHARTS = 10


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = write_run(tmp_path_factory.mktemp("runs"), rounds=30)
    write_report(made)
    return made


@pytest.mark.parametrize("width", [390, 1040])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_all_charts_are_there_and_nothing_is_wider_than_the_window(
    tab: Browser, folder: Path, width: int, dark: bool
) -> None:
    tab.open(folder / "report.html", width, dark=dark)
    assert tab.complaints == []
    assert tab.evaluate("document.querySelectorAll('.vega svg.marks, .vega canvas.marks').length") == CHARTS
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    widths = "[...document.querySelectorAll('.vega')].map(e => [e.clientWidth, e.querySelector('svg').clientWidth])"
    for room, drawn in tab.evaluate(widths):
        assert 0.9 * room < drawn <= room
    background = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") is not dark


def test_the_heat_map_tells_what_is_under_the_pointer(tab: Browser, folder: Path) -> None:
    tab.open(folder / "report.html", 1040)
    place = "document.querySelector('#chart-participation .mark-rect path')"
    x, y = tab.evaluate(
        f"(() => {{ const e = {place}; e.scrollIntoView({{block: 'center'}}); const box = e.getBoundingClientRect(); "
        "return [box.x + box.width / 2, box.y + box.height / 2]; })()"
    )
    tab.point_at(x, y)
    told = tab.evaluate("document.getElementById('vg-tooltip-element').innerText")
    first = next(iter(records(30)[0]["allocation"]))
    for word in ("round", f"client {first} (clean)", "number of blocks", "blocks held", "1–4"):
        assert word in told


def test_runs_side_by_side_are_drawn_too(tab: Browser, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "both.html"
    file.write_text(read_page([folder, write_run(tmp_path, "other", rounds=12)]).html())
    tab.open(file, 390)
    assert tab.complaints == []
    assert tab.evaluate("document.documentElement.dataset.drawn") == "6"
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390


def test_a_chart_that_cannot_be_drawn_is_noticed(tab: Browser, folder: Path, tmp_path: Path) -> None:
    """Otherwise the other tests would show nothing."""
    broken = (folder / "report.html").read_text().replace('"type": "rule"', '"type": "no such mark"')
    (tmp_path / "broken.html").write_text(broken.replace("<header>", "<header><img src='http://example.com/a.png'>"))
    tab.open(tmp_path / "broken.html", 390)
    assert any("TypeError" in text for text in tab.complaints)
    assert any("example.com" in text for text in tab.complaints)
    assert tab.evaluate("document.documentElement.dataset.drawn") == str(CHARTS - 1)
    assert "This chart cannot be drawn" in tab.evaluate("document.getElementById('chart-gains').textContent")
