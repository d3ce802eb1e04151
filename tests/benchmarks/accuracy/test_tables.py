"""What an accuracy study's tables say of its results."""

from __future__ import annotations

from math import sqrt
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.accuracy.runs import next_target
from benchmarks.accuracy.tables import BELOW, markdown, short_table, standard_error


def found(*averages: float, stopped: str = "") -> dict[str, Any]:
    """A seed in which `fedra` has these accuracies, in both domains, after 10, 20, … rounds."""
    records: list[dict[str, Any]] = [{"round": round} for round in range(10 * len(averages))]
    for index, average in enumerate(averages):
        records[10 * index + 9]["accuracy"] = {"art": average, "photo": average}
    return {
        "frozen": {"art": 0.1, "photo": 0.2},
        "probe": {"art": 0.5, "photo": 0.7},
        "alpha": 1.0,
        "tests": {"art": 100, "photo": 50},
        "methods": {"fedra": {"records": records, "stopped": stopped}, "depthfl": {"records": [], "stopped": ""}},
    }


def study(**seeds: dict[str, Any]) -> dict[str, Any]:
    calls = [{"device": "a GPU", "versions": "torch", "seconds": 240.0, "rounds": 60}]
    head = {"command": "python x", "device": "a GPU", "versions": "torch", "setting": {"rank": 8}, "calls": calls}
    return head | {"seeds": seeds}


def cells(text: str, name: str) -> list[list[str]]:
    """The rows of the tables in `text` that have a cell `name`."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return [row for row in rows if name in row]


def test_the_standard_error_is_that_of_the_numbers_of_test_images() -> None:
    error = standard_error({"art": 0.5, "photo": 0.8}, {"art": 100, "photo": 50})
    assert error == pytest.approx(sqrt(0.25 / 100 + 0.16 / 50) / 2)


def test_the_last_evaluation_stands_beside_the_frozen_model_the_probe_and_the_change() -> None:
    text = short_table(study(**{"0": found(0.3, 0.4)}))
    assert cells(text, "frozen") == [["frozen", "", "10.0", "20.0", "15.0", "3.2", "", ""]]
    assert cells(text, "ridge probe") == [["ridge probe", "", "50.0", "70.0", "60.0", "4.1", "", ""]]
    assert cells(text, "fedra") == [["fedra", "20", "40.0", "40.0", "40.0", "4.2", "+10.0 (10)", BELOW]]
    assert cells(text, "depthfl") == [["depthfl", "0", *[""] * 6]]


@pytest.mark.parametrize(("average", "marked"), [(0.59, True), (0.61, False)])
def test_only_averages_below_the_probe_are_marked(average: float, marked: bool) -> None:
    rows = cells(markdown(study(**{"0": found(average)})), "fedra")
    assert len(rows) == 2
    assert [BELOW in row for row in rows] == [marked, marked]


def test_every_evaluation_is_listed_by_round() -> None:
    rows = cells(markdown(study(**{"0": found(0.3, 0.4)})), "fedra")
    assert [row[:3] for row in rows[1:]] == [["10", "fedra", "30.0"], ["20", "fedra", "40.0"]]


def test_seeds_are_averaged_where_all_of_them_have_been() -> None:
    text = markdown(study(**{"0": found(0.3, 0.5), "1": found(0.4)})).partition("## All seeds")[2]
    assert cells(text, "fedra") == [["fedra", "10", "35.0 ± 7.1", "35.0 ± 7.1", "35.0 ± 7.1"]]
    assert cells(text, "depthfl") == []


def test_what_stopped_a_method_is_said() -> None:
    assert "fedra stopped: RuntimeError: boom" in markdown(study(**{"0": found(0.3, stopped="RuntimeError: boom")}))


def run(rounds: int, seconds: float | None = None, *, stopped: str = "", pause: float = 0.0) -> Any:
    return SimpleNamespace(rounds=rounds, round_seconds=seconds, stopped=stopped, pause_seconds=pause)


@pytest.mark.parametrize(
    ("runs", "seconds", "target"),
    [
        ([run(0), run(0)], 100.0, 1),
        ([run(1, 1.0), run(1)], 100.0, 2),
        ([run(2, 1.0), run(2, 2.0)], 100.0, 10),
        # Eight rounds of both would take 24 seconds, five take 15.
        ([run(2, 1.0), run(2, 2.0)], 17.0, 7),
        ([run(2, 1.0, pause=1.0), run(2, 2.0, pause=1.5)], 17.0, 6),
        ([run(2, 1.0), run(2, 2.0)], 2.9, 2),
        # One that an earlier call left behind catches up first.
        ([run(7, 1.0), run(3, 1.0)], 100.0, 10),
        ([run(7, 1.0), run(3, 1.0)], 4.0, 7),
        ([run(7, 1.0), run(3, 1.0, stopped="error")], 100.0, 10),
        ([run(20, 1.0), run(20, 1.0)], 100.0, 25),
        ([run(25, 1.0), run(25, 1.0)], 100.0, 25),
        ([run(3, stopped="error")], 100.0, 25),
        ([run(0), run(0)], 0.0, 0),
    ],
)
def test_a_turn_goes_to_the_next_multiple_of_a_slice_or_as_far_as_time_allows(
    runs: list[Any], seconds: float, target: int
) -> None:
    assert next_target(runs, slice=10, rounds=25, seconds=seconds) == target
