"""Charts show the numbers of the run, count from 1, and stay small however long the run was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedra_engine.report.charts import allocation, label_matrix, participation, run_charts, trainings
from fedra_engine.report.comparison import comparison_charts
from fedra_engine.report.facts import RunFacts, read_run
from fedra_engine.report.marks import MOST_CELLS, Chart, binned, runs_text, some_of, thinned
from tests.report.run_folders import CLIENTS, DEPTH, records, start_facts, write_run


def rows(chart: Chart | None) -> list[dict[str, Any]]:
    assert chart is not None
    values: list[dict[str, Any]] = chart.spec["data"]["values"]
    return values


def names(charts: list[Chart]) -> list[str]:
    return [chart.name for chart in charts]


@pytest.fixture
def run(tmp_path: Path) -> RunFacts:
    return read_run(write_run(tmp_path, rounds=6))


def test_a_run_has_all_charts_but_those_of_devices(run: RunFacts) -> None:
    results, blocks = ["accuracy", "gains", "loss"], ["allocation", "participation", "trainings", "block_changes"]
    assert names(run_charts(run)) == [*results, *blocks, "labels", "seconds"]


def test_a_cell_of_the_allocation_says_who_held_the_block(run: RunFacts) -> None:
    held = {int(client): blocks for client, blocks in records(6)[2]["allocation"].items()}
    found = {(row["x"], row["y"]): row for row in rows(allocation(run))}
    assert len(found) == 6 * DEPTH
    for block in range(DEPTH):
        cell, holders = found["3", block + 1], [client for client, blocks in held.items() if block in blocks]
        assert cell["v"] == pytest.approx(len(holders) / 3, abs=1e-4)
        assert cell["n"] == f"{len(holders)} of 3"
        assert cell["c"] == (", ".join(map(str, holders)) or "none")


def test_a_cell_of_the_participation_has_round_client_and_blocks(run: RunFacts) -> None:
    cells = {(row["x"], row["y"]): (row["v"], row["t"]) for row in rows(participation(run))}
    assert len(cells) == 6 * 3
    clients = [client for client in records(6)[0]["allocation"] if int(client) < 2]
    assert cells[1, f"client {clients[0]} (clean)"] == (4, "1–4")


def test_trainings_are_counted_over_all_rounds(run: RunFacts) -> None:
    blocks = [block for record in records(6) for held in record["allocation"].values() for block in held]
    assert rows(trainings(run)) == [{"b": block + 1, "v": blocks.count(block)} for block in range(DEPTH)]


def test_long_runs_are_shown_in_groups_of_rounds(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path, rounds=5000))
    cells = rows(allocation(run))
    assert MOST_CELLS / 2 < len(cells) <= MOST_CELLS
    # Each client of a round holds as many blocks as it can.
    assert sum(cell["v"] for cell in cells) == pytest.approx(len(cells) / DEPTH * 7 / 3, rel=0.01)
    assert cells[0]["x"] == "1–8"
    assert participation(run) is None


def test_groups_are_of_neighbours_and_keep_the_mean(run: RunFacts) -> None:
    assert [name for name, _ in binned(run.rounds, 2)] == ["1–3", "4–6"]
    assert [name for name, _ in binned(run.rounds, 100)] == ["1", "2", "3", "4", "5", "6"]
    many = [each for _ in range(200) for each in run.rounds]
    points = list(thinned(many, lambda each: float(each.number)))
    assert len(points) == 600
    assert points[0] == (1.5, 1.5)


def test_of_many_evaluations_some_are_shown_the_last_among_them() -> None:
    found = some_of({number: number for number in range(1001)}, 5)
    assert found == {0: 0, 250: 250, 500: 500, 750: 750, 1000: 1000}
    assert some_of({3: "a", 4: "b"}, 5) == {3: "a", 4: "b"}


def test_classes_of_many_clients_are_counted_by_domain(tmp_path: Path) -> None:
    classes = 1 + MOST_CELLS // CLIENTS
    counts = [[label, 1, 2, 3, 4, 5] for label in range(classes)]
    facts = start_facts(classes=[f"class {label}" for label in range(classes)], label_counts=counts)
    cells = rows(label_matrix(read_run(write_run(tmp_path, facts=facts))))
    assert [(cell["x"], cell["v"]) for cell in cells[:3]] == [("clean", 1), ("noisy", 5), ("edges", 9)]
    assert cells[3] == {"x": "clean", "y": "class 1", "v": 2}


def test_what_is_not_known_has_no_chart(tmp_path: Path) -> None:
    lines = [{name: value for name, value in line.items() if name != "allocation"} for line in records(2)]
    folder = write_run(tmp_path, rounds=2, lines=lines, of_summary={"block_changes": None})
    (folder / "facts.json").unlink()
    assert names(run_charts(read_run(folder))) == ["accuracy", "gains", "loss", "seconds"]


def test_devices_have_their_time(tmp_path: Path) -> None:
    lines = [{**line, "simulated_seconds": 10.0} for line in records(2)]
    assert "simulated_seconds" in names(run_charts(read_run(write_run(tmp_path, rounds=2, lines=lines))))


def test_of_many_domains_the_lowest_are_shown_beside_the_average(tmp_path: Path) -> None:
    tuned = {f"domain {number}": number / 20 for number in range(20)}
    lines = [{**line, "accuracy": tuned} for line in records(1)]
    folder = write_run(tmp_path, rounds=1, lines=lines, of_summary={"tuned": tuned, "frozen": tuned})
    chart = run_charts(read_run(folder))[0]
    assert {row["series"] for row in rows(chart)} == {"average", *(f"domain {number}" for number in range(8))}
    assert "Of 20 domains" in chart.note


def test_runs_side_by_side_have_the_same_names_in_all_charts(tmp_path: Path) -> None:
    runs = {name: read_run(write_run(tmp_path, name, rounds=4)) for name in ("one", "two")}
    charts = comparison_charts(runs)
    assert names(charts) == ["accuracy", "domains", "loss", "trainings", "allocation_1", "allocation_2"]
    for chart in charts[:4]:
        assert {row["series"] for row in rows(chart)} == {"one", "two"}
        assert chart.spec["encoding"]["color"]["scale"]["domain"] == ["one", "two"]
    assert charts[4].title.endswith(": one")


@pytest.mark.parametrize(
    ("numbers", "text"), [([], ""), ([4], "4"), ([1, 2, 3], "1–3"), ([1, 2, 4, 7, 8], "1–2, 4, 7–8")]
)
def test_numbers_in_few_characters(numbers: list[int], text: str) -> None:
    assert runs_text(numbers) == text


def test_specifications_are_json(run: RunFacts) -> None:
    for chart in run_charts(run):
        assert json.loads(json.dumps(chart.spec, allow_nan=False)) == chart.spec
