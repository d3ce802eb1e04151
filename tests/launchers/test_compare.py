"""The `compare` launcher, from command line to tables."""

import csv
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from filelock import FileLock

from tests.studies.planned import SMALL as FEW_ROUNDS

SMALL = [*FEW_ROUNDS, "--control=false"]

pytestmark = pytest.mark.slow


@pytest.fixture
def compare(launch: Callable[..., object]) -> Callable[..., object]:
    """A function that runs the launcher with arguments and returns its exit code."""
    return partial(launch, "compare")


def test_methods_and_seeds_end_in_one_table(
    compare, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*SMALL, "--output_dir", str(tmp_path), "--methods=fedra,fedra:method.allocation=covered", "--seeds=0,1"]
    assert compare(*options) == 0
    first = capsys.readouterr().out
    names = ["fedra-seed0", "fedra-allocation=covered-seed0", "fedra-seed1", "fedra-allocation=covered-seed1"]
    assert all((tmp_path / name / "summary.json").is_file() for name in names)
    # The table is wider than a terminal of tests, and stays in one piece.
    heads = [line.split() for line in first.splitlines() if line.startswith("method")]
    assert [head[-1] for head in heads] == ["probe", "seconds", "p", "1"]
    with (tmp_path / "comparison.csv").open(newline="") as file:
        lines = [(line["method"], line["seed"], line["domain"]) for line in csv.DictReader(file)]
    labels, domains = ("fedra", "fedra allocation=covered"), ("clean", "noisy")
    runs, references = ([(label, seed) for seed in "01" for label in labels], ("frozen", "ridge probe"))
    runs += [(label, seed) for label in references for seed in "01"]
    assert lines == [(label, seed, domain) for label, seed in runs for domain in domains]
    page = (tmp_path / "comparison.md").read_text()
    assert "launchers/compare.py --rounds=2 --evaluate_every=1 " in page
    # Everything is only read.
    for name in ("run.build_experiment", "studies.compare.build_experiment", "studies.references.build_experiment"):
        monkeypatch.setattr(f"fedra_engine.{name}", None)
    assert compare(*options) == 0
    assert capsys.readouterr().out.count("(finished before)") == 4
    assert (tmp_path / "comparison.md").read_text() == page


TITLES = ["Accuracy", "Costs", "Differences on the samples of a seed", "Grid"]


def test_a_grid_chooses_before_the_test_set_is_seen_and_goes_on_after_an_interrupt(
    compare, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*FEW_ROUNDS, "--rounds=1", "--methods=fedra,fedit:training.lr=0.02"]
    options += ["--grid=training.lr=3,1e-6", "--output_dir"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert compare(*options, str(whole)) == 0
    told = capsys.readouterr().out
    assert told.startswith(f"4 runs on validation samples in {whole}/grid; each writes")
    assert f"\n3 runs in {whole}; each writes" in told
    # Nothing is left of the model at a rate of 3.
    assert "\nfedra: chose training.lr=1e-6\nalllarge ignore_capacities=true: chose training.lr=1e-6\n" in told
    for folder, kind, fraction in ((whole / "grid", "validation", 0.2), (whole, "test", 0.0)):
        run = folder / "fedra-training.lr=1e-6-seed0"
        assert f'"measured_on": "{kind} samples"' in (run / "summary.json").read_text()
        assert f"validation_fraction: {fraction}\n" in (run / "config.yaml").read_text()
    page = (whole / "comparison.md").read_text()
    assert "measured on test samples" in page
    assert page.count("| yes, at the edge of training.lr |") == 2

    def interrupt(run: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fedra_engine.studies.compare.read_trial", interrupt)
        assert compare(*options, str(parts)) == 130
        assert "the same command resumes it" in capsys.readouterr().err
    assert compare(*options, str(parts)) == 0
    again = capsys.readouterr().out
    assert again.count("(finished before)") == 1
    pages = [text.split("## ") for text in (page, (parts / "comparison.md").read_text())]
    assert [section.splitlines()[0] for section in pages[0][1:]] == TITLES
    # All but the command and the seconds.
    assert [pages[0][index] for index in (1, 3, 4)] == [pages[1][index] for index in (1, 3, 4)]
    assert compare(*options, str(parts)) == 0
    assert capsys.readouterr().out.count("(finished before)") == 7


def test_a_table_of_long_labels_is_not_cut(compare, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fields = ["training.optimizer=sgd", "training.momentum=0.123456789", "training.weight_decay=0.0001"]
    entry = ":".join(["fedra", "lora.target_modules=[q_proj,k_proj,v_proj,o_proj,fc1,fc2]", *fields])
    assert compare(*SMALL, "--rounds=1", f"--output_dir={tmp_path}", f"--methods={entry}") == 0
    told = capsys.readouterr().out
    assert "…" not in told
    assert "\ns.e. is the standard error that the number of test samples gives the average.\n" in told
    assert len(next(line for line in told.splitlines() if line.startswith("method")).rstrip()) > 200


def test_a_failing_method_is_reported_and_makes_the_exit_code_2(
    compare, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare(*SMALL, "--rounds=1", "--output_dir", str(tmp_path), "--methods=alllarge,fedra") == 2
    output, error = capsys.readouterr()
    assert "1/2  alllarge seed 0: clients.capacities: found at most 4 of 12 blocks" in output
    assert "2/2  fedra seed 0: " in output
    assert error.startswith("error: methods: found 1 of 2 runs that failed (alllarge seed 0), expected all to finish")
    assert error.count("\n") == 1
    assert "- alllarge seed 0: clients.capacities" in (tmp_path / "comparison.md").read_text()


def test_without_a_result_there_is_no_table_and_the_exit_code_is_2(
    compare, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*SMALL, "--rounds=1", "--output_dir", str(tmp_path)]
    assert compare(*options, "--methods=fedra") == 0
    assert (tmp_path / "comparison.md").is_file()
    assert compare(*options, "--methods=alllarge") == 2
    assert not (tmp_path / "comparison.md").exists()
    capsys.readouterr()
    with FileLock(tmp_path / ".fedra-seed1.lock"):
        assert compare(*options, "--methods=fedra", "--seeds=1") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: methods: found all 1 runs being executed by other processes, expected one that is")
    assert error.count("\n") == 1


def test_bad_input_is_one_line_and_code_2(compare, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.touch()
    assert compare("--methods=fedra", f"--output_dir={file}/runs") == 2
    assert compare("--methods=fedra", "--output_dir=/proc") == 2
    assert compare("--methods=fedra,fedre", f"--output_dir={tmp_path}/runs") == 2
    below_a_file, read_only, unknown = capsys.readouterr().err.splitlines()
    assert below_a_file.startswith(f"error: output_dir: cannot make {file}/runs: ")
    assert read_only.startswith("error: output_dir: cannot make /proc: ")
    assert unknown.startswith("error: method.name: found 'fedre', expected one of fedra, ")
    assert not (tmp_path / "runs").exists()


def test_worker_processes_share_the_runs(compare, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [*SMALL, "--rounds=1", f"--output_dir={tmp_path}", "--methods=alllarge,fedra"]
    assert compare(*options, "--jobs=2", "--oversubscribe=true") == 2
    told = capsys.readouterr().out
    assert "alllarge seed 0: clients.capacities: found at most 4 of 12 blocks" in told
    (done,) = (line for line in told.splitlines() if "/2  fedra seed 0: " in line)
    assert compare(*options) == 2
    again = capsys.readouterr().out
    assert f"{done.partition('  ')[2]} (finished before)" in again


def test_no_run_begins_where_there_are_too_few_cores(
    compare, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedra_engine.runtime.processes._cores", lambda: 2)
    monkeypatch.setattr("fedra_engine.studies.compare.execute_all", None)
    options = [*SMALL, f"--output_dir={tmp_path}/out", "--methods=fedra,fedit", "--seeds=0,1", "--jobs=9"]
    assert compare(*options) == 2
    assert capsys.readouterr().err.startswith("error: jobs: found 4, expected no more than this machine's 2 cores")
    assert not (tmp_path / "out").exists()


def test_a_launcher_of_several_processes_is_refused(
    compare, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert compare("--methods=fedra") == 2
    assert capsys.readouterr().err.startswith("error: processes: found several")
