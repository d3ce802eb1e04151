"""Charts show the numbers of the run, count from 1, and stay small however long the run was."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from fedra_engine.report import charts
from fedra_engine.report.charts import allocation, label_matrix, loss, participation, run_charts, shares, trainings
from fedra_engine.report.comparison import comparison_charts
from fedra_engine.report.facts import RunFacts, read_run
from fedra_engine.report.marks import MOST_CELLS, Chart, binned, runs_text, thinned
from fedra_engine.report.vega import svg
from tests.report.run_folders import CLIENTS, DEPTH, DOMAINS, records, start_facts, write_run


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
    results, blocks = ["accuracy", "gains", "loss", "measures"], ["allocation", "participation", "trainings"]
    assert names(run_charts(run)) == [*results, "seconds", *blocks, "block_changes", "labels"]


def test_losses_of_training_and_of_evaluations_are_in_one_chart(run: RunFacts) -> None:
    """The last one is not defined for all domains."""
    chart = loss(run)
    assert chart is not None
    assert chart.spec["encoding"]["tooltip"][-1]["format"] == ",.4r", "four significant digits"
    lines: dict[str, list[tuple[float, float]]] = {"test samples": [], "training": []}
    for row in rows(chart):
        lines[row["series"]].append((row["round"], row["value"]))
    assert lines["test samples"] == [(0, 2.5), (2, pytest.approx(5 / 3)), (4, pytest.approx(4 / 3))]
    assert lines["training"] == [(number, pytest.approx(2.5 / number)) for number in range(1, 7)]


def test_measures_beside_the_accuracy_are_shown_in_percent(run: RunFacts) -> None:
    found = [(row["series"], row["round"], row["value"]) for row in rows(shares(run))]
    points = zip((0, 2, 4, 6), (12.5, 25 / 3, 50 / 3, 25), strict=True)
    assert found == [("macro-F1", number, pytest.approx(value)) for number, value in points]


def test_the_best_round_is_marked(tmp_path: Path, run: RunFacts) -> None:
    assert "layer" not in run_charts(run)[0].spec
    best = {"best": {"round": 3, "measure": "macro_f1", "value": 0.5, "accuracy": {}}}
    mark = run_charts(read_run(write_run(tmp_path, "best", of_summary=best)))[0].spec["layer"][0]
    assert mark["data"]["values"] == [{"round": 4, "about": "best round by macro-F1"}]


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


@pytest.mark.parametrize("clients", [CLIENTS, 101])
def test_clients_that_never_took_part_are_named_and_of_a_few_shown(tmp_path: Path, clients: int) -> None:
    lines = records(2)
    for line in lines:
        line["allocation"] = {"0": [0], "3": [1], "4": [2]}
    domains = [DOMAINS[client * 3 // clients] for client in range(clients)]
    run = read_run(write_run(tmp_path, rounds=2, lines=lines, facts=start_facts(client_domains=domains)))
    chart = charts.participation(run)
    assert chart is not None
    shown = chart.spec["encoding"]["y"]["scale"]["domain"]
    if clients == CLIENTS:
        assert shown == [f"client {client} ({domain})" for client, domain in enumerate(domains)]
        named = "client 1 (clean), client 2 (noisy), client 5 (edges)"
        assert chart.note.endswith(f" Of 6 clients, 3 took part in no round: {named}.")
    else:
        assert shown == ["client 0 (clean)", "client 3 (clean)", "client 4 (clean)"]
        assert " Of 101 clients, 98 took part in no round: client 1 (clean), " in chart.note
        assert chart.note.endswith("client 12 (clean) and 88 others.")


@pytest.mark.parametrize("lost", [{"bad_updates": 1}, {"late": 1, "dropped": 0}, {"late": 0, "dropped": 1}])
def test_clients_may_have_taken_part_where_updates_were_lost(tmp_path: Path, lost: dict[str, int]) -> None:
    lines = records(2)
    for line in lines:
        line["allocation"] = {str(client): [0] for client in range(CLIENTS - 1)}
    lines[1] |= lost
    chart = charts.participation(read_run(write_run(tmp_path, rounds=2, lines=lines)))
    assert chart is not None
    assert chart.note.endswith(" Of 6 clients, 1 had no update that counted: client 5 (edges).")


def test_a_run_in_which_everybody_took_part_names_nobody(run: RunFacts, tmp_path: Path) -> None:
    lines = records(2)
    for line in lines:
        line["allocation"] = {str(client): [0] for client in range(CLIENTS)}
    chart = charts.participation(read_run(write_run(tmp_path, "all", rounds=2, lines=lines)))
    assert chart is not None
    assert chart.note.endswith("its update did not count.")


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


def test_participants_of_a_long_run_are_counted_by_domain(tmp_path: Path) -> None:
    """One client of each of three domains takes part in each round, and holds 4, 2 or 1 blocks."""
    chart = participation(read_run(write_run(tmp_path, rounds=5000)))
    cells = rows(chart)
    assert MOST_CELLS / 2 < len(cells) <= MOST_CELLS
    assert {(cell["y"], cell["v"], cell["t"]) for cell in cells} == {("clean", 1, 4), ("noisy", 1, 2), ("edges", 1, 1)}
    assert chart is not None
    assert "too many to show them one by one" in chart.note


def test_clients_whose_domains_are_not_known_are_not_shown(tmp_path: Path) -> None:
    """Of very many clients, few take part in a round."""
    facts = start_facts(client_domains=[], client_ranks=[], client_samples=[], client_capacities=[], classes=[])
    assert participation(read_run(write_run(tmp_path, facts=facts))) is None


def test_groups_are_of_neighbours_and_keep_the_mean(run: RunFacts) -> None:
    assert [name for name, _ in binned(run.rounds, 2)] == ["1–3", "4–6"]
    assert [name for name, _ in binned(run.rounds, 100)] == ["1", "2", "3", "4", "5", "6"]
    many = [each for _ in range(200) for each in run.rounds]
    points = list(thinned(many, lambda each: float(each.number)))
    assert len(points) == 600
    assert points[0] == (1.5, 1.5)


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
    assert names(run_charts(read_run(folder))) == ["accuracy", "gains", "loss", "measures", "seconds"]


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


def labels(chart: Chart, axis: str) -> list[str]:
    """What the `axis` of a chart says beside its ticks, as it is drawn."""
    drawn = svg(chart.spec)
    (part,) = re.findall(rf'aria-label="{axis}-axis.*?role-axis-label(.*?)role-axis', drawn, flags=re.DOTALL)
    return re.findall(r">([^<>]+)</text>", part)


@pytest.mark.parametrize(("rounds", "ticks"), [(1, ["0", "1"]), (2, ["0", "1", "2"])])
def test_ticks_are_at_whole_rounds(tmp_path: Path, rounds: int, ticks: list[str]) -> None:
    run = read_run(write_run(tmp_path, rounds=rounds, lines=records(rounds, 1)))
    for found in (run_charts(run)[0], comparison_charts({"a": run, "b": run})[0]):
        assert found.name == "accuracy"
        assert labels(found, "X") == ticks
    long = read_run(write_run(tmp_path, "long", rounds=50, lines=records(50)))
    assert all(label.isdigit() for label in labels(run_charts(long)[0], "X"))


def test_a_line_of_one_round_is_a_point_beside_the_number_that_it_shows(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path, rounds=1, lines=records(1, 9)))
    (found,) = (chart for chart in comparison_charts({"a": run}) if chart.name == "loss")
    assert [row["value"] for row in rows(found)] == [2.5]
    assert svg(found.spec).count('aria-roledescription="point"') == 1
    assert labels(found, "Y")[-1] == "2.5"


def test_the_points_of_long_lines_are_not_marked(tmp_path: Path) -> None:
    found = loss(read_run(write_run(tmp_path, rounds=60, lines=records(60))))
    assert found is not None
    assert 'aria-roledescription="point"' not in svg(found.spec)


def test_specifications_are_json(run: RunFacts) -> None:
    for chart in run_charts(run):
        assert json.loads(json.dumps(chart.spec, allow_nan=False)) == chart.spec
