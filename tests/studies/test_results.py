"""Tables, files and the figure, against values computed by hand."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from fedra_engine.runtime.errors import InputError
from fedra_engine.runtime.tables import markdown_table
from fedra_engine.studies.results import REPORT, RunCosts, RunResult, cells, latex_table, write_report

COMMAND = "python launchers/compare.py --methods fedra,flora"


def result(label: str, seed: int, sun: float, rain: float, seconds: float = 2.0) -> RunResult:
    return RunResult(
        label=label,
        seed=seed,
        rounds=20,
        seconds=seconds,
        accuracy={"sun": sun, "rain": rain},
        frozen={"sun": 0.5, "rain": 0.25},
        curve={0: 0.375, 10 + seed: 0.4, 20: (sun + rain) / 2},
        costs=RunCosts(trainable_parameters=1234.5, uploaded_bytes=98765.0, training_flops=3.456e12),
    )


RESULTS = [result("fedra", 0, 0.5, 0.3), result("flora a_b=1", 0, 0.9, 0.8), result("fedra", 1, 0.7, 0.2, 400.0)]


def test_cells_are_percent_with_deviation_and_costs_in_readable_units() -> None:
    header, fedra, flora = cells(RESULTS)
    units = ["trainable", "upload (kB)", "TFLOP", "seconds"]
    assert header == ["method", "seeds", "sun", "rain", "average", "frozen", *units]
    assert fedra == ["fedra", "2", "60.0 ± 14.1", "25.0 ± 7.1", "42.5 ± 3.5", "37.5", "1,234", "98.8", "3.46", "201"]
    assert flora[2:5] == ["90.0", "80.0", "85.0"]


def test_a_domain_that_a_method_does_not_have_is_a_dash() -> None:
    fewer = RunResult("fedit", 0, 1, 1.0, {"sun": 1.0}, {"sun": 0.0}, {}, RunCosts(1, 1, 1))
    assert cells([*RESULTS, fewer])[3][:5] == ["fedit", "1", "100.0", "–", "100.0"]


def test_markdown_and_latex_have_the_same_cells() -> None:
    rows = [["method", "sun"], ["a_b [50%]", "1.0 ± –"]]
    assert markdown_table(rows) == "| method | sun |\n| --- | ---: |\n| a_b [50%] | 1.0 ± – |\n"
    assert latex_table(rows).splitlines() == [
        r"\begin{tabular}{lr}",
        r"\toprule",
        r"method & sun \\",
        r"\midrule",
        r"a\_b [50\%] & 1.0 $\pm$ -- \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


def test_labels_may_have_what_means_something_to_latex_or_matplotlib(tmp_path: Path) -> None:
    label = r"fedra lora.target_modules=^~(q\w$|v\w$)<>"
    write_report(tmp_path, COMMAND, [replace(RESULTS[0], label=label)], {})
    escaped = (
        r"fedra lora.target\_modules=\textasciicircum{}\textasciitilde{}(q\textbackslash{}w\$\textbar{}v"
        r"\textbackslash{}w\$)\textless{}\textgreater{} & 1 &"
    )
    assert escaped in (tmp_path / "comparison.tex").read_text()
    assert (tmp_path / "accuracy_by_round.png").is_file()


@pytest.mark.parametrize("label", [r"fedra $\frac$", "fedra $a", "fedra \x1b[1A|`\n*"])
def test_no_label_breaks_a_table_or_the_picture(tmp_path: Path, label: str) -> None:
    write_report(tmp_path, COMMAND, [replace(RESULTS[0], label=label)], {})
    rows = [line for line in (tmp_path / "comparison.md").read_text().splitlines() if line.startswith("| fedra")]
    assert len(rows) == 1
    assert rows[0].replace("\\|", "").count("|") == 11
    assert (tmp_path / "accuracy_by_round.png").is_file()


def test_a_command_of_several_lines_is_a_comment_in_latex(tmp_path: Path) -> None:
    write_report(tmp_path, "python 'a\n\nb'", RESULTS, {})
    lines = (tmp_path / "comparison.tex").read_text().splitlines()
    assert lines[:4] == ["% python 'a", "% ", "% b'", r"\begin{tabular}{lrrrrrrrrr}"]


def test_the_report_says_how_it_was_made_and_what_is_missing(tmp_path: Path) -> None:
    rows = write_report(tmp_path, COMMAND, RESULTS, {"alllarge seed 3": "clients.capacities: found 6"})
    page = (tmp_path / "comparison.md").read_text()
    assert page.startswith(f"# Comparison\n\n```\n{COMMAND}\n```\n")
    assert markdown_table(rows) in page
    assert "- alllarge seed 3: clients.capacities: found 6\n" in page
    assert (tmp_path / "comparison.tex").read_text() == f"% {COMMAND}\n{latex_table(rows)}"
    assert (tmp_path / "accuracy_by_round.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_has_what_to_know_of_a_method_once(tmp_path: Path) -> None:
    cautioned = [replace(result("hetlora", seed, 0.5, 0.5), caution="one rank for all") for seed in (0, 1)]
    write_report(tmp_path, COMMAND, [*RESULTS, *cautioned], {})
    page = (tmp_path / "comparison.md").read_text()
    assert page.count("- hetlora: one rank for all\n") == 1
    assert page.count("- fedra") == 0


@pytest.mark.parametrize("name", ["comparison.csv", "comparison.md", "comparison.tex", "accuracy_by_round.png"])
def test_a_report_replaces_only_what_a_comparison_wrote(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match=f"{name}: found something that this command did not make"):
        REPORT.check(tmp_path)
    (tmp_path / name).unlink()
    write_report(tmp_path, COMMAND, RESULTS, {})
    REPORT.check(tmp_path)


def test_a_report_can_be_removed_and_leaves_everything_else(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    write_report(tmp_path, COMMAND, RESULTS, {})
    REPORT.remove(tmp_path)
    REPORT.remove(tmp_path)
    assert {entry.name for entry in tmp_path.iterdir()} - {".comparison.lock"} == {"notes.txt"}


def test_the_csv_has_a_line_for_each_run_and_domain(tmp_path: Path) -> None:
    write_report(tmp_path, COMMAND, RESULTS, {})
    with (tmp_path / "comparison.csv").open(newline="") as file:
        header, *lines = csv.reader(file)
    assert header == [
        *("method", "seed", "domain", "accuracy", "frozen_accuracy", "rounds", "seconds"),
        *("trainable_parameters", "uploaded_bytes", "training_flops"),
    ]
    assert len(lines) == 6
    assert lines[3] == ["flora a_b=1", "0", "rain", "0.8", "0.25", "20", "2.0", "1234.5", "98765.0", "3456000000000.0"]


@pytest.mark.filterwarnings("error")
def test_the_picture_has_room_for_long_labels(tmp_path: Path) -> None:
    def size(label: str) -> tuple[int, int]:
        write_report(tmp_path, COMMAND, [replace(RESULTS[0], label=label)], {})
        with Image.open(tmp_path / "accuracy_by_round.png") as picture:
            return picture.size

    (short, height), (long, same) = size("fedra"), size("fedra " + 30 * "long ")
    assert long > short
    assert same == height
