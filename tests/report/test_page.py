"""The page says what came of a run, needs no other file, and stays small."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fedra_engine.config import DataConfig
from fedra_engine.report import page, vega, words
from fedra_engine.report.facts import read_run
from fedra_engine.report.page import read_page, write_report
from tests.report.run_folders import TUNED, records, start_facts, write_run

MOST_BYTES = 2_000_000
VALIDATED = {"data": DataConfig(validation_fraction=0.25)}


@pytest.fixture
def no_script(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the JavaScript that draws."""
    monkeypatch.setattr(page, "javascript", lambda: "")


def test_the_verdict_compares_with_the_frozen_model_and_names_the_worst_and_what_was_lost(tmp_path: Path) -> None:
    assert words.verdict(read_run(write_run(tmp_path))) == (
        "Tuning raised the average accuracy by 18.3 points, from 50.0 % for the frozen model to 68.3 %. The worst "
        "domain, edges, is at 50.0 % (frozen: 20.0 %). 1 domain lost points: clean (5.0)."
    )


def test_the_verdict_of_one_domain_is_a_sentence(tmp_path: Path) -> None:
    worse = {"frozen": {"only": 0.5}, "tuned": {"only": 0.25}}
    assert words.verdict(read_run(write_run(tmp_path, "a", of_summary=worse))) == (
        "Tuning lowered the average accuracy by 25.0 points, from 50.0 % for the frozen model to 25.0 %."
    )
    # As a mean in another order may differ.
    same = {"frozen": {"only": 0.5}, "tuned": {"only": 0.5 - 1e-15}}
    assert words.verdict(read_run(write_run(tmp_path, "b", of_summary=same))) == (
        "Tuning left the average accuracy at 50.0 %."
    )


def test_a_run_that_has_not_ended_says_how_far_it_is(tmp_path: Path, no_script: None) -> None:
    folder = write_run(tmp_path, rounds=6, lines=records(6)[:2])
    (folder / "summary.json").unlink()
    found = read_page([folder])
    assert found.verdict == "This run has not ended: 2 of 6 rounds are trained."
    assert f">{found.verdict}<" in found.html()


def test_what_spoils_the_numbers_is_said(tmp_path: Path) -> None:
    lines = records(6)
    for number in (1, 2, 4):
        lines[number]["bad_updates"] = 1
    lines[3] |= {"late": 2, "dropped": 1, "loss": None}
    for line in lines:
        line["allocation"] = {client: [0] for client in line["allocation"]}
    told = {
        "caution": "some clients are small",
        "tuned_is": "the clients' own models",
        "stopped": "enough",
    }
    facts = start_facts(notes=["Costs were not counted, as the model is sharded."])
    run = write_run(tmp_path, lines=lines, of_summary=told, facts=facts, changes=VALIDATED)
    assert words.warnings(read_run(run)) == [
        "Some clients are small.",
        "Accuracies are measured on validation samples, not on the test samples.",
        "The tuned accuracy is that of the clients' own models. The adapter alone has 68.3 % on average.",
        "Stopped early: enough.",
        "3 updates were left out for values that are not finite, in rounds 2–3, 5.",
        "2 updates arrived too late, and 1 participant dropped out.",
        "Nobody trained in 1 round: 4.",
        "Never trained: blocks 2–4.",
        "Costs were not counted, as the model is sharded.",
    ]
    assert words.warnings(read_run(write_run(tmp_path, "plain"))) == []


def test_the_numbers_to_see_first(tmp_path: Path) -> None:
    found = words.cards(read_run(write_run(tmp_path, rounds=10)))
    assert found["average accuracy"] == "50.0 → 68.3 %"
    assert found["worst domain, edges"] == "20.0 → 50.0 %"
    assert (found["rounds"], found["updates a round"], found["training FLOPs"]) == ("10", "3", "70 M")
    assert (found["average test loss"], found["average macro-F1"]) == ("2.500 → –", "12.5 → 25.0 %")
    assert found["memory of a client, at most"] == "176 KiB"


def test_measures_are_a_table_by_domain(tmp_path: Path, no_script: None) -> None:
    table = read_page([write_run(tmp_path)]).tables[0]
    assert table.rows == [
        ["domain", "accuracy", "test loss", "macro-F1"],
        ["clean", "90.0 → 85.0 %", "2.500 → 0.5000", "12.5 → 25.0 %"],
        ["noisy", "40.0 → 70.0 %", "2.500 → 1.250", "12.5 → 25.0 %"],
        ["edges", "20.0 → 50.0 %", "2.500 → –", "12.5 → 25.0 %"],
        ["average", "50.0 → 68.3 %", "2.500 → –", "12.5 → 25.0 %"],
    ]
    older = read_page([write_run(tmp_path, "older", of_summary={"measures": {}})])
    assert "Measures by domain" not in [table.title for table in older.tables]


BEST = {
    "best": {"round": 3, "measure": "macro_f1", "value": 0.5, "accuracy": {"clean": 0.9, "noisy": 0.8, "edges": 0.4}},
}


def test_the_best_round_stands_beside_the_last_one(tmp_path: Path) -> None:
    first, second, *_ = words.cards(read_run(write_run(tmp_path, of_summary=BEST))).items()
    assert first == ("average accuracy", "50.0 → 68.3 %")
    assert second == ("average accuracy after round 4, the best by macro-F1", "70.0 %")


def test_the_verdict_says_that_samples_are_those_of_validation(tmp_path: Path) -> None:
    told = "Tuning raised the average accuracy on validation samples by 18.3 points, from 50.0 % for the frozen model"
    assert words.verdict(read_run(write_run(tmp_path, of_summary=BEST, changes=VALIDATED))).startswith(told)
    same = BEST | {"frozen": TUNED}
    assert words.verdict(read_run(write_run(tmp_path, "same", of_summary=same, changes=VALIDATED))).startswith(
        "Tuning left the average accuracy on validation samples at 68.3 %."
    )


def test_a_run_with_a_best_round_says_how_to_measure_it(tmp_path: Path, no_script: None) -> None:
    folder = write_run(tmp_path, "my run", of_summary=BEST, changes=VALIDATED)
    made = read_page([folder])
    (table,) = made.results
    assert table.title == "Results"
    command = f"fedra evaluate '{folder}' --best --data.validation_fraction 0"
    assert table.note.startswith("On validation samples. The best round by macro-F1 is kept in best/")
    assert f"<code>{command}</code>".replace("'", "&#39;") in made.html()
    assert table.rows == [
        ["accuracy (%)", "frozen", "round 6, the last", "round 4, the best"],
        ["clean", "90.0", "85.0", "90.0"],
        ["noisy", "40.0", "70.0", "80.0"],
        ["edges", "20.0", "50.0", "40.0"],
        ["average", "50.0", "68.3", "70.0"],
    ]
    assert read_page([write_run(tmp_path, "plain")]).results == []


def test_names_are_never_taken_for_markup(tmp_path: Path, no_script: None) -> None:
    evil = "</script><img src=x onerror=alert(1)>"
    accuracy = {evil: 0.5, "b": 0.25}
    lines = [{**line, "accuracy": accuracy} for line in records(2)]
    facts = start_facts(client_domains=[evil] * 6, classes=[evil, "1"])
    told = {"frozen": accuracy, "tuned": accuracy, "caution": evil, "measures": {}}
    html = read_page([write_run(tmp_path, rounds=2, lines=lines, facts=facts, of_summary=told)]).html()
    assert "<img" not in html
    assert html.count("</script>") == 2
    specs = re.search(r"const specs = (.*);", html)
    assert specs is not None
    assert json.loads(specs[1])["accuracy"]["data"]["values"][1]["series"] == evil


def test_the_page_stands_alone_and_is_small_however_much_there_was(tmp_path: Path) -> None:
    """Heat maps of as many cells as are shown one by one, all with long texts."""
    clients = rounds = depth = classes = 50
    domains = [f"a domain with a very long name, number {number}" for number in range(clients)]
    held = {str(client): list(range(0, depth, 2)) for client in range(clients)}
    accuracy = dict.fromkeys(domains, 1 / 3)
    line = {**records(1)[0], "participants": clients, "allocation": held, "accuracy": accuracy}
    facts = start_facts(
        blocks=depth,
        client_domains=domains,
        client_ranks=[8] * clients,
        classes=[f"class {label:<30}" for label in range(classes)],
        label_counts=[[123456] * clients] * classes,
    )
    told = {"frozen": accuracy, "tuned": accuracy, "measures": {}}
    lines = [{**line, "round": round} for round in range(rounds)]
    folder = write_run(tmp_path, rounds=rounds, lines=lines, facts=facts, of_summary=told)
    write_report(folder)
    html = (folder / "report.html").read_text()
    assert 1_500_000 < len(html.encode()) < MOST_BYTES
    assert not re.search(r"<(link|iframe|img)|\s(src|href)=", html.partition("<script>")[0])
    assert "default-src 'none'" in html


def test_the_page_of_a_long_run_is_small_too(tmp_path: Path) -> None:
    lines = [{**line, "accuracy": {"clean": 1 / 3, "noisy": 1 / 7, "edges": 1 / 9}} for line in records(3000)]
    write_report(write_run(tmp_path, rounds=3000, lines=lines))
    assert (tmp_path / "run" / "report.html").stat().st_size < MOST_BYTES


def test_several_runs_are_compared(tmp_path: Path, no_script: None) -> None:
    best = {"round": 3, "measure": "macro_f1", "value": 0.5, "accuracy": {}}
    low = {"tuned": {"clean": 0.5, "noisy": 0.5, "edges": 0.5}, "best": best}
    folders = [write_run(tmp_path / "a", "run"), write_run(tmp_path / "b", "run", of_summary=low, changes={"seed": 3})]
    found = read_page(folders)
    assert found.verdict == (f"{folders[0]} has the highest average accuracy, 68.3 %; {folders[1]} the lowest, 50.0 %.")
    assert found.tables[0].rows == [["setting", *map(str, folders)], ["seed", "0", "3"]]
    assert [row[:6] for row in found.results[0].rows[1:]] == [
        [str(folders[0]), "fedra", "6", "50.0 %", "68.3 %", "50.0 % (edges)"],
        [str(folders[1]), "fedra", "6", "50.0 %", "50.0 %", "50.0 % (clean)"],
    ]
    assert found.results[1].rows == [
        ["run", "test loss", "macro-F1", "best round"],
        [str(folders[0]), "2.500 → –", "12.5 → 25.0 %", "–"],
        [str(folders[1]), "2.500 → –", "12.5 → 25.0 %", "4 (by macro-F1)"],
    ]
    assert "2 runs side by side" in found.html()


def test_runs_on_different_samples_are_not_ranked(tmp_path: Path, no_script: None) -> None:
    folders = [write_run(tmp_path / "a", "run"), write_run(tmp_path / "b", "run", changes=VALIDATED)]
    found = read_page(folders)
    assert found.verdict == (
        "Accuracies on validation samples cannot be compared with those on test samples: "
        f"{folders[0]} has 68.3 % on test samples; {folders[1]} has 68.3 % on validation samples."
    )
    assert [row[3] for row in found.results[0].rows] == ["samples", "test", "validation"]
    assert found.results[1].rows[0][1] == "held-out loss"
    alone = read_page(folders[1:])
    assert alone.tables[0].rows[0][2] == "validation loss"
    assert "average validation loss" in alone.cards


def test_the_script_is_bundled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import vl_convert

    bundled = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(vl_convert, "javascript_bundle", lambda snippet: bundled.append(1) or "the script")
    assert [vega.javascript(), vega.javascript()] == ["the script", "the script"]
    assert len(bundled) == 1


def test_a_cache_that_cannot_be_written_only_costs_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import vl_convert

    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(vl_convert, "javascript_bundle", lambda snippet: "the script")
    assert vega.javascript() == "the script"


def test_every_chart_is_a_figure_too(tmp_path: Path) -> None:
    found = read_page([write_run(tmp_path)])
    found.write_figures(tmp_path / "figures")
    for chart in found.charts:
        drawing = (tmp_path / "figures" / f"{chart.name}.svg").read_text()
        assert drawing.startswith("<svg")
        assert "<path" in drawing
        assert (tmp_path / "figures" / f"{chart.name}.png").read_bytes().startswith(b"\x89PNG")
