"""What the reports of all studies share."""

import sys
from pathlib import Path

import pytest

from fedra_engine.callbacks.run_folder import RunFolder
from fedra_engine.config import ExperimentConfig
from fedra_engine.runtime.errors import InputError
from fedra_engine.studies.comparison_report import REPORT as COMPARISON
from fedra_engine.studies.measurements import REPORT as SCALING
from fedra_engine.studies.report import ReportFiles, command_text


@pytest.mark.parametrize(
    ("program", "text"),
    [
        ("launchers/compare.py", "python launchers/compare.py --name 'a b'"),
        ("/venv/bin/fedra", "fedra --name 'a b'"),
        ("/site-packages/fedra_engine/__main__.py", "fedra --name 'a b'"),
    ],
)
def test_a_report_names_the_command_as_it_can_be_typed_again(
    program: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [program, "--name", "a b"])
    assert command_text() == text


@pytest.mark.parametrize("report", [COMPARISON, SCALING])
def test_a_study_does_not_write_into_the_folder_of_a_run(tmp_path: Path, report: ReportFiles) -> None:
    # A configuration alone may be the study's own.
    run = RunFolder.create(ExperimentConfig(output_dir=str(tmp_path), name="first"))
    report.check(run.path)
    run.log_file.touch()
    with pytest.raises(InputError, match=r"^output_dir: found a run in .*/first, expected another folder$"):
        report.check(run.path)
