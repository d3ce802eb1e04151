"""The share of a run that its measures, its tracker and its report take, on the embedded experiment."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.watching import WatchingTimes, measure_watching
from tests.running import small_config

pytestmark = pytest.mark.slow


def test_a_run_is_divided_into_watching_and_training() -> None:
    *parts, whole = measure_watching(small_config(Path(), evaluate_every=1, report_to=["tensorboard"]))
    by_name = {each.part: each for each in parts}
    assert list(by_name) == ["measures", "trackers", "report"]
    assert {name for name, each in by_name.items() if each.once > 0} == {"trackers", "report"}
    assert {name for name, each in by_name.items() if each.watched > 0} == {"measures", "trackers"}
    assert (whole.part, whole.once) == ("all", pytest.approx(sum(each.once for each in parts)))
    assert 0 < whole.watched < whole.round


def test_shares_are_of_a_round_and_of_the_whole_run() -> None:
    row = WatchingTimes("report", once=2.0, watched=0.01, round=1.0, rounds=50).row()
    assert row["share_of_a_round"] == "1.00%"
    assert row["with_once,_of_50_rounds"] == "5.00%"
