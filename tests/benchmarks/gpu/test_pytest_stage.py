"""The stage that runs the GPU tests, on tests of its own that need no GPU."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from benchmarks.gpu.findings import Findings, StageFailed
from benchmarks.gpu.pytest_stage import FAILURES, run_tests

pytestmark = pytest.mark.slow

TESTS = """
import os
import time
import pytest

@pytest.mark.gpu
@pytest.mark.parametrize("number", range(5))
def test_some(number):
    check(number)

def check(number):
    assert number != {wrong}, f"number is wrong:\\n{{number}}" + 400 * "!"

def test_without_the_marker():
    raise AssertionError

@pytest.mark.gpu
def test_last():
    if {hang}:
        time.sleep(600)
    if {crash}:
        os._exit(7)
"""


def make_root(tmp_path: Path, *, wrong: int = -1, crash: bool = False, hang: bool = False) -> Path:
    (tmp_path / "pyproject.toml").write_text('[tool.pytest.ini_options]\nmarkers = ["gpu: needs a GPU"]\n')
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_some.py").write_text(TESTS.format(wrong=wrong, crash=crash, hang=hang))
    return tmp_path


def run(root: Path, *, seconds: float = 60.0, keyword: str = "") -> Findings:
    findings = Findings(root, "tests", until=time.monotonic() + seconds)
    # This process has threads of its own, so none is forked from it.
    run_tests(findings, root, selection="tests", marker="gpu", keyword=keyword, most_processes=2, method="spawn")
    return findings


def test_every_marked_test_runs_once_in_one_of_the_processes(tmp_path: Path) -> None:
    figure, compiled = run(make_root(tmp_path)).figures
    assert (figure.value, figure.met) == (6, True)
    assert compiled.value == 0


def test_a_keyword_chooses_among_them(tmp_path: Path) -> None:
    figure, _ = run(make_root(tmp_path), keyword="last").figures
    assert figure.value == 1


def test_a_failure_is_named_with_its_reason(tmp_path: Path) -> None:
    root = make_root(tmp_path, wrong=3)
    with pytest.raises(StageFailed, match=r"^1 of 6: .*test_some\[3\]"):
        run(root)
    (row,) = json.loads((root / "tests.json").read_text())["tables"]["failures"]
    assert row["reason"].startswith("AssertionError: number is wrong: 3!!!")
    assert len(row["reason"]) == 300


def test_what_pytest_tells_of_a_failure_is_kept_though_its_process_breaks_off_later(tmp_path: Path) -> None:
    root = make_root(tmp_path, wrong=1, crash=True)
    with pytest.raises(StageFailed, match=r"test_some\[1\]"):
        run(root)
    kept = (root / FAILURES).read_text()
    assert kept.startswith("tests/test_some.py::test_some[1] (call)\n")
    assert ">       check(number)" in kept
    assert "assert 1 != 1" in kept


def test_a_skipped_test_is_told_with_its_reason_and_not_all_have_passed(tmp_path: Path) -> None:
    root = make_root(tmp_path)
    with (root / "tests" / "test_some.py").open("a") as file:
        file.write('\n@pytest.mark.gpu\ndef test_large():\n    pytest.skip("needs 40 GiB")\n')
        file.write('\n@pytest.mark.gpu\n@pytest.mark.skip(reason="not here")\ndef test_marked():\n    pass\n')
    findings = run(root)
    figure = findings.figures[0]
    assert (figure.value, figure.target, figure.met) == (6, "all; 2 skipped", False)
    rows = {row["test"].rpartition("::")[2]: row["reason"] for row in findings.rows["skipped"]}
    assert rows == {"test_large": "needs 40 GiB", "test_marked": "not here"}


def test_a_process_that_breaks_off_fails_the_stage_and_the_others_count(tmp_path: Path) -> None:
    root = make_root(tmp_path, crash=True)
    with pytest.raises(StageFailed, match=r"7.* in .*test_last"):
        run(root)
    assert json.loads((root / "tests.json").read_text())["figures"][0]["value"] >= 3


def test_no_test_at_all_is_a_failure(tmp_path: Path) -> None:
    root = make_root(tmp_path)
    (root / "tests" / "test_some.py").write_text("")
    with pytest.raises(StageFailed, match="no test"):
        run(root)


def test_tests_that_do_not_end_in_time_are_named_and_the_others_count(tmp_path: Path) -> None:
    root = make_root(tmp_path, hang=True)
    with pytest.raises(StageFailed, match="the time was up after 5 tests"):
        run(root, seconds=25.0)
    found = json.loads((root / "tests.json").read_text())
    assert found["left_out"] == ["tests after the first 5"]
    (row,) = found["tables"]["failures"]
    assert row["test"].endswith("test_last")
    assert row["reason"] == "had not ended"
