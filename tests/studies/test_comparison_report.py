"""The report of a comparison, against values computed by hand."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from fedra_engine.runtime.errors import InputError
from fedra_engine.runtime.tables import Cells, markdown_table
from fedra_engine.studies.comparison_report import (
    REPORT,
    Findings,
    TriedPoint,
    latex_table,
    tables,
    write_report,
)
from fedra_engine.studies.outcomes import SampleOutcomes
from fedra_engine.studies.references import References
from fedra_engine.studies.results import RunCosts, RunResult

COMMAND = "python launchers/compare.py --methods fedra,flora"


def result(label: str, seed: int, sun: float, rain: float, seconds: float = 2.0) -> RunResult:
    """Ten samples of `sun` and five of `rain`, of which the first ones are predicted correctly."""
    tests = {"sun": 10, "rain": 5}
    accuracy = {"sun": sun, "rain": rain}
    correct = {name: "".join(str(int(i < round(accuracy[name] * n))) for i in range(n)) for name, n in tests.items()}
    return RunResult(
        label=label,
        seed=seed,
        rounds=20,
        seconds=seconds,
        accuracy=accuracy,
        frozen={"sun": 0.5, "rain": 0.25},
        curve={0: 0.375, 10 + seed: 0.4, 20: (sun + rain) / 2},
        caution=None,
        costs=RunCosts(trainable_parameters=1234.5, uploaded_bytes=98765.0, training_flops=3.456e12),
        outcomes=SampleOutcomes(f"samples of seed {seed}", tests, correct),
    )


RESULTS = [result("fedra", 0, 0.5, 0.4), result("flora a_b=1", 0, 0.9, 0.8), result("fedra", 1, 0.7, 0.2, 400.0)]


def findings(*results: RunResult, **others: object) -> Findings:
    return Findings(COMMAND, "test samples", "fedra", results or RESULTS, **others)


def table(title: str, *results: RunResult, **others: object) -> Cells:
    (rows,) = (section.rows for section in tables(findings(*results, **others)) if section.title == title)
    return rows


def reference(seed: int, probe: float | None, frozen: float = 0.3) -> References:
    both = None if probe is None else {"sun": probe, "rain": probe}
    return References(seed, {"sun": frozen, "rain": frozen}, both, {"sun": 10, "rain": 5})


def test_accuracies_are_percent_with_the_deviation_over_seeds_and_the_error_of_the_samples() -> None:
    header, fedra, flora = table("Accuracy")
    assert header == ["method", "seeds", "sun", "rain", "average", "s.e.", "frozen", "ridge probe"]
    # The square root of 0.5 · 0.5 / 10 + 0.4 · 0.6 / 5, halved, is 0.1351; of seed 1, it is 0.1151.
    assert fedra == ["fedra", "2", "60.0 ± 14.1", "30.0 ± 14.1", "45.0 ± 0.0", "12.5", "37.5", ""]
    assert flora[2:6] == ["90.0", "80.0", "85.0", "10.1"]


def test_costs_are_in_readable_units() -> None:
    header, fedra, _ = table("Costs")
    assert header == ["method", "trainable", "upload (kB)", "TFLOP", "seconds"]
    assert fedra == ["fedra", "1,234", "98.8", "3.46", "201"]


def test_the_frozen_model_and_the_probe_come_first() -> None:
    _, frozen, probe, *_ = table("Accuracy", references=[reference(0, 0.6), reference(1, 0.8)])
    assert frozen == ["frozen", "2", "30.0 ± 0.0", "30.0 ± 0.0", "30.0 ± 0.0", "12.5", "", ""]
    # 0.6 · 0.4 and 0.8 · 0.2, times 1 / 10 + 1 / 5, roots halved: 0.1342 and 0.1095.
    assert probe == ["ridge probe", "2", "70.0 ± 14.1", "70.0 ± 14.1", "70.0 ± 14.1", "12.2", "", ""]
    assert [row[0] for row in table("Accuracy", references=[reference(0, None)])] == [
        *("method", "frozen", "fedra", "flora a_b=1"),
    ]


@pytest.mark.parametrize(
    ("at_fifteen", "mark"), [(0.2, "▼ rising"), (0.31, "▼ rising"), (0.32, "▼ flat"), (0.5, "▼ flat")]
)
def test_what_is_below_the_probe_is_marked_and_whether_it_was_rising(at_fifteen: float, mark: str) -> None:
    """The last average is 0.45, its standard error 0.1351."""
    one = replace(RESULTS[0], curve={0: 0.0, 15: at_fifteen, 18: 0.0, 20: 0.45})
    assert table("Accuracy", one, references=[reference(0, 0.46)])[-1][-1] == mark
    assert table("Accuracy", one, references=[reference(0, 0.44)])[-1][-1] == ""
    # Of another seed, or other samples.
    assert table("Accuracy", one, references=[reference(1, 0.46)])[-1][-1] == ""
    other = replace(one, outcomes=replace(one.outcomes, tests={"sun": 10, "rain": 6}))
    assert table("Accuracy", other, references=[reference(0, 0.46)])[-1][-1] == ""


def legends(*results: RunResult, **others: object) -> dict[str, str]:
    return {section.title: "\n".join(section.legend) for section in tables(findings(*results, **others))}


def test_a_legend_explains_the_signs_that_are_in_its_table_and_no_others() -> None:
    one = legends(RESULTS[0], references=[reference(0, 0.44)])["Accuracy"]
    assert one == "s.e. is the standard error that the number of test samples gives the average."
    below = legends(replace(RESULTS[0], curve={0: 0.1, 20: 0.45}), references=[reference(0, 0.9)])["Accuracy"]
    assert "▼ marks averages below the ridge probe" in below
    assert "rising" not in below
    rising = replace(RESULTS[0], curve={0: 0.0, 15: 0.2, 20: 0.45})
    assert "rising or flat: whether" in legends(rising, references=[reference(0, 0.9)])["Accuracy"]
    whole = legends(*RESULTS, result("flora a_b=1", 1, 0.8, 0.6))
    assert "± is the standard deviation over the seeds" in whole["Accuracy"]
    assert whole["Differences over seeds"].startswith("The difference is that from fedra with the same seed")
    for_samples = "For example, 8 : 5 means 8 samples that only fedra predicts correctly, and 5 that only the method"
    assert whole["Differences on the samples of a seed"].startswith(for_samples)
    assert not [title for title, legend in whole.items() if "–" in legend]


def test_a_legend_says_what_a_dash_in_its_table_means() -> None:
    texts = [replace(each, outcomes=SampleOutcomes("", None, None)) for each in RESULTS]
    assert "–: not measured, or not defined" in legends(*texts)["Accuracy"]
    failed = [TriedPoint("fedra", "training.lr=9", None, False, ())]
    some = legends(*RESULTS, tried=failed)
    assert "–: fewer than two seeds of both methods" in some["Differences over seeds"]
    assert "–: a run or its predictions are missing" in some["Differences on the samples of a seed"]
    assert some["Grid"] == "–: the run has failed."


def test_a_run_with_no_earlier_evaluation_is_neither_rising_nor_flat() -> None:
    one = replace(RESULTS[0], curve={0: 0.1, 20: 0.45})
    assert table("Accuracy", one, references=[reference(0, 0.9)])[-1][-1] == "▼"


def test_where_seeds_end_after_different_rounds_no_mean_is_called_rising(tmp_path: Path) -> None:
    """The mean curve ends at round 20, before the second run has its accuracy."""
    one = replace(RESULTS[0], curve={0: 0.0, 15: 0.2, 20: 0.45})
    two = replace(RESULTS[2], rounds=40, curve={0: 0.0, 15: 0.2, 20: 0.4, 40: 0.45})
    references = [reference(0, 0.9), reference(1, 0.9)]
    assert table("Accuracy", one, replace(two, rounds=20), references=references)[-1][-1] == "▼ rising"
    assert table("Accuracy", one, two, references=references)[-1][-1] == "▼"
    write_report(tmp_path, findings(one, two))
    note = "- fedra: seeds ended after 20, 40 rounds; tables have each at its own end, the curve stops at the first\n"
    assert note in (tmp_path / "comparison.md").read_text()


def test_texts_of_many_predictions_have_no_standard_error_and_no_test() -> None:
    texts = [replace(each, outcomes=SampleOutcomes("", None, None)) for each in RESULTS]
    assert table("Accuracy", *texts)[1][5] == "–"
    titles = [section.title for section in tables(findings(*texts))]
    assert titles == ["Accuracy", "Costs", "Differences over seeds"]


def test_differences_over_seeds_are_those_of_equal_seeds() -> None:
    """+0.4 and +0.1: mean 0.25, deviation 0.2121, error 0.15; t is 5 / 3, p with one degree of freedom 0.344."""
    others = [result("flora", 1, 0.5, 0.6), result("flora", 0, 0.9, 0.8), result("flora", 7, 0.1, 0.2)]
    _, flora = table("Differences over seeds", *RESULTS[::2], *others)
    assert flora == ["flora", "2", "+25.0", "15.0", "0.34"]
    assert table("Differences over seeds", *RESULTS)[1] == ["flora a_b=1", "1", "–", "–", "–"]


def test_differences_on_samples_are_of_the_first_entry_and_the_method_with_the_same_samples() -> None:
    """`flora` is right on four more samples of `sun` and two more of `rain`: p = 2 / 2⁶."""
    header, flora = table("Differences on the samples of a seed")
    assert header == ["method", "seed 0", "seed 1"]
    assert flora == ["flora a_b=1", "0 : 6 (p = 0.031)", "–"]
    other = replace(RESULTS[1].outcomes, samples="others")
    assert table("Differences on the samples of a seed", RESULTS[0], replace(RESULTS[1], outcomes=other))[1][1] == "–"
    personal = replace(RESULTS[1].outcomes, correct=None)
    assert table("Differences on the samples of a seed", RESULTS[0], replace(RESULTS[1], outcomes=personal))[1] == [
        *("flora a_b=1", "–")
    ]


def test_without_the_first_entry_nothing_is_compared_with_it() -> None:
    assert [section.title for section in tables(findings(RESULTS[1], RESULTS[1]))] == ["Accuracy", "Costs"]


def test_the_grid_shows_all_points_the_chosen_one_and_what_failed() -> None:
    tried = [
        TriedPoint("fedra", "training.lr=0.01", 0.5, True, ("training.lr",)),
        TriedPoint("fedra", "training.lr=1", None, False, ("training.lr",)),
        TriedPoint("flora", "training.lr=0.1", 0.25, True, ()),
    ]
    assert table("Grid", tried=tried)[1:] == [
        ["fedra", "training.lr=0.01", "50.0", "yes, at the edge of training.lr"],
        ["fedra", "training.lr=1", "–", ""],
        ["flora", "training.lr=0.1", "25.0", "yes"],
    ]


def test_a_domain_that_a_method_does_not_have_is_a_dash() -> None:
    fewer = replace(
        RESULTS[1], accuracy={"sun": 1.0}, frozen={"sun": 0.0}, outcomes=SampleOutcomes("", {"sun": 10}, None)
    )
    assert table("Accuracy", RESULTS[0], fewer)[2][:5] == ["flora a_b=1", "1", "100.0", "–", "100.0"]


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
    write_report(tmp_path, findings(replace(RESULTS[0], label=label)))
    escaped = (
        r"fedra lora.target\_modules=\textasciicircum{}\textasciitilde{}(q\textbackslash{}w\$\textbar{}v"
        r"\textbackslash{}w\$)\textless{}\textgreater{} & 1 &"
    )
    assert escaped in (tmp_path / "comparison.tex").read_text()
    assert (tmp_path / "accuracy_by_round.png").is_file()


@pytest.mark.parametrize("label", [r"fedra $\frac$", "fedra $a", "fedra \x1b[1A|`\n*"])
def test_no_label_breaks_a_table_or_the_picture(tmp_path: Path, label: str) -> None:
    write_report(tmp_path, findings(replace(RESULTS[0], label=label)))
    rows = [line for line in (tmp_path / "comparison.md").read_text().splitlines() if line.startswith("| fedra")]
    assert len(rows) == 2
    assert [row.replace("\\|", "").count("|") for row in rows] == [9, 6]
    assert (tmp_path / "accuracy_by_round.png").is_file()


def test_a_page_of_validation_samples_says_so(tmp_path: Path) -> None:
    write_report(tmp_path, replace(findings(), samples="validation samples"))
    assert "measured on validation samples: mean" in (tmp_path / "comparison.md").read_text()


def test_a_command_of_several_lines_is_a_comment_in_latex(tmp_path: Path) -> None:
    write_report(tmp_path, replace(findings(), command="python 'a\n\nb'"))
    lines = (tmp_path / "comparison.tex").read_text().splitlines()
    assert lines[:5] == ["% python 'a", "% ", "% b'", "% Accuracy", r"\begin{tabular}{lrrrrrrr}"]


def test_the_report_says_how_it_was_made_and_what_is_missing(tmp_path: Path) -> None:
    sections = write_report(tmp_path, findings(missing={"alllarge seed 3": "clients.capacities: found 6"}))
    page = (tmp_path / "comparison.md").read_text()
    assert page.startswith(f"# Comparison\n\n```\n{COMMAND}\n```\n")
    assert [f"## {section.title}" for section in sections] == [line for line in page.splitlines() if line[:2] == "##"]
    assert all(markdown_table(section.rows) in page for section in sections)
    assert "- alllarge seed 3: clients.capacities: found 6\n" in page
    latex = (tmp_path / "comparison.tex").read_text()
    assert latex.startswith(f"% {COMMAND}\n% Accuracy\n{latex_table(sections[0].rows)}\n% Costs\n")
    assert (tmp_path / "accuracy_by_round.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_has_what_to_know_of_a_method_once(tmp_path: Path) -> None:
    cautioned = [replace(result("hetlora", seed, 0.5, 0.5), caution="one rank for all") for seed in (0, 1)]
    write_report(tmp_path, findings(*RESULTS, *cautioned))
    page = (tmp_path / "comparison.md").read_text()
    assert page.count("- hetlora: one rank for all\n") == 1
    assert page.count("- fedra") == 0


@pytest.mark.parametrize("name", ["comparison.csv", "comparison.md", "comparison.tex", "accuracy_by_round.png"])
def test_a_report_replaces_only_what_a_comparison_wrote(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match=f"{name}: found something that this command did not make"):
        REPORT.check(tmp_path)
    (tmp_path / name).unlink()
    write_report(tmp_path, findings())
    REPORT.check(tmp_path)


def test_a_report_can_be_removed_and_leaves_everything_else(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    write_report(tmp_path, findings())
    REPORT.remove(tmp_path)
    REPORT.remove(tmp_path)
    assert {entry.name for entry in tmp_path.iterdir()} - {".comparison.lock"} == {"notes.txt"}


def test_the_csv_has_a_line_for_each_run_and_reference_and_domain(tmp_path: Path) -> None:
    write_report(tmp_path, findings(references=[reference(0, 0.6)]))
    with (tmp_path / "comparison.csv").open(newline="") as file:
        header, *lines = csv.reader(file)
    assert header == [
        *("method", "seed", "domain", "accuracy", "standard_error", "frozen_accuracy", "rounds", "seconds"),
        *("trainable_parameters", "uploaded_bytes", "training_flops"),
    ]
    assert len(lines) == 10
    error = str((0.8 * (1 - 0.8) / 5) ** 0.5)
    assert lines[3][:5] == ["flora a_b=1", "0", "rain", "0.8", error]
    assert lines[3][5:] == ["0.25", "20", "2.0", "1234.5", "98765.0", "3456000000000.0"]
    assert [line[:4] for line in lines[6:]] == [
        *(["frozen", "0", domain, "0.3"] for domain in ("sun", "rain")),
        *(["ridge probe", "0", domain, "0.6"] for domain in ("sun", "rain")),
    ]
    assert lines[6][5:] == [""] * 6


@pytest.mark.filterwarnings("error")
def test_the_picture_has_room_for_long_labels(tmp_path: Path) -> None:
    def size(label: str) -> tuple[int, int]:
        write_report(tmp_path, findings(replace(RESULTS[0], label=label)))
        with Image.open(tmp_path / "accuracy_by_round.png") as picture:
            return picture.size

    (short, height), (long, same) = size("fedra"), size("fedra " + 30 * "long ")
    assert long > short
    assert same == height
