"""The stage that runs the GPU tests, on tests of its own that need no GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedra_engine.benchmarks.gpu.findings import Findings, StageFailed
from fedra_engine.benchmarks.gpu.pytest_stage import run_gpu_tests

TESTS = """
import os
import pytest

@pytest.mark.gpu
@pytest.mark.parametrize("number", range(5))
def test_some(number):
    assert number != {wrong}, "number is wrong"

def test_without_the_marker():
    raise AssertionError

@pytest.mark.gpu
def test_last():
    if {crash}:
        os._exit(7)
"""


def make_root(tmp_path: Path, *, wrong: int = -1, crash: bool = False) -> Path:
    (tmp_path / "pyproject.toml").write_text('[tool.pytest.ini_options]\nmarkers = ["gpu: needs a GPU"]\n')
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_some.py").write_text(TESTS.format(wrong=wrong, crash=crash))
    return tmp_path


def run(root: Path) -> Findings:
    findings = Findings(root, "tests", seconds=60.0)
    run_gpu_tests(findings, root, selection="tests", processes=2)
    return findings


def test_every_marked_test_runs_once_in_one_of_the_processes(tmp_path: Path) -> None:
    (figure,) = run(make_root(tmp_path)).figures
    assert (figure.value, figure.met) == (6, True)


def test_a_failure_is_named_with_its_reason(tmp_path: Path) -> None:
    root = make_root(tmp_path, wrong=3)
    with pytest.raises(StageFailed, match=r"^1 of 6: .*test_some\[3\]"):
        run(root)
    (row,) = json.loads((root / "tests.json").read_text())["tables"]["failures"]
    assert "AssertionError" in row["reason"]


def test_a_process_that_breaks_off_fails_the_stage_and_the_others_count(tmp_path: Path) -> None:
    root = make_root(tmp_path, crash=True)
    with pytest.raises(StageFailed, match="7"):
        run(root)
    assert json.loads((root / "tests.json").read_text())["figures"][0]["value"] >= 3


def test_no_test_at_all_is_a_failure(tmp_path: Path) -> None:
    root = make_root(tmp_path)
    (root / "tests" / "test_some.py").write_text("")
    with pytest.raises(StageFailed, match="no test"):
        run(root)
