"""Every run leaves its report, and none fails for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedra_engine.report import writer
from fedra_engine.report.facts import StartFacts, read_run
from fedra_engine.run import build, load_run
from tests.running import run_experiment, small_config

FEW: dict[str, Any] = {
    "data": {"domains": ["clean", "inverted"], "clients_per_domain": 2},
    "clients": {"capacities": [12, 3], "sampling": "uniform"},
}
pytestmark = pytest.mark.usefixtures("quick_runs")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_experiment(tmp_path_factory.mktemp("runs"), **FEW)


def test_a_run_leaves_a_report_with_its_facts(folder: Path) -> None:
    run, experiment = read_run(folder), load_run(folder).experiment
    assert (folder / "report.html").read_text().count("data-chart=") == 10
    assert run.start is not None
    assert run.start.client_domains == ["clean", "clean", "inverted", "inverted"]
    assert run.start.blocks == len(run.summary["block_changes"]) == 12
    assert np.sum(run.start.label_counts) == sum(run.start.client_samples) == len(experiment.train_data)
    assert run.start.described["samples"] == "280 training, 120 test"
    assert "torch" in run.start.environment
    assert run.start.notes == []
    assert run.start.shares == ["accuracy", "macro_f1", "calibration_error"]


def test_costs_are_those_of_the_experiment(folder: Path) -> None:
    run, costs = read_run(folder), load_run(folder).experiment.costs()
    assert run.start is not None
    assert [(kind.held, kind.trained, kind.clients) for kind in run.start.kinds] == [(12, 12, 2), (3, 3, 2)]
    assert max(kind.memory for kind in run.start.kinds) == costs.memory.max()
    assert run.totals is not None
    assert run.totals.uploaded == pytest.approx(2 * costs.uploaded.sum())
    # Every client takes part in both rounds.
    assert run.totals.flops == pytest.approx(2 * costs.flops.sum())


def test_a_report_that_cannot_be_made_is_a_line_and_the_run_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("no room\nfor a report")

    monkeypatch.setattr(writer, "write_report", refuse)
    monkeypatch.setattr(StartFacts, "write", refuse)
    run = run_experiment(tmp_path, **FEW)
    line = "report: no room for a report; the run does without it"
    assert [text for text in caplog.messages if text.startswith("report")] == [line, line]
    assert json.loads((run / "summary.json").read_text())["rounds"] == 2
    assert line in (run / "run.log").read_text()
    assert not {"report.html", "facts.json"} & {path.name for path in run.iterdir()}


def test_costs_that_cannot_be_counted_are_missed_with_their_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("out of memory")

    experiment = build(small_config(tmp_path, **FEW))
    monkeypatch.setattr(writer, "client_kinds", refuse)
    facts = writer.start_facts(experiment)
    assert (facts.kinds, facts.notes) == ([], ["Costs were not counted: out of memory"])
    monkeypatch.setattr(writer, "is_sharded", lambda _: True)
    assert writer.start_facts(experiment).notes == ["Costs were not counted, as the model is sharded."]


def test_of_very_many_clients_kinds_alone_are_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "MOST_ALLOCATED", 3)
    facts = writer.start_facts(build(small_config(tmp_path, **FEW)))
    assert (facts.client_domains, facts.client_samples, facts.classes, facts.label_counts) == ([], [], [], [])
    assert sum(kind.clients for kind in facts.kinds) == 3
    assert facts.notes == ["Of more than 3 clients, neither labels nor participation are shown."]
