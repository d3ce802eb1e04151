"""`fedra report`: a page for finished runs, one or several, and refusals of one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedra_engine.commands.report import main
from fedra_engine.report import page
from fedra_engine.runtime.errors import InputError
from tests.report.run_folders import write_run


@pytest.fixture(autouse=True)
def _no_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "javascript", lambda: "")


def test_the_page_of_a_run_goes_into_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path)
    before = {file.name for file in folder.iterdir()}
    main([str(folder)])
    assert {file.name for file in folder.iterdir()} - before == {"report.html"}
    assert capsys.readouterr().out == f"report: {folder / 'report.html'}\n"


def test_several_runs_get_one_page_where_it_is_asked_for(tmp_path: Path) -> None:
    folders = [write_run(tmp_path, name) for name in ("one", "two")]
    main([*map(str, folders), "--output", str(tmp_path / "both.html")])
    assert "one has the highest average accuracy" in (tmp_path / "both.html").read_text()
    assert not (folders[0] / "report.html").exists()


def test_figures_are_the_charts_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "svg", json.dumps)
    monkeypatch.setattr(page, "png", lambda spec: b"drawn")
    main([str(write_run(tmp_path)), "--figures", str(tmp_path / "a" / "figures")])
    names = {file.name for file in (tmp_path / "a" / "figures").iterdir()}
    assert {"accuracy.svg", "accuracy.png", "allocation.svg", "allocation.png"} <= names
    assert len(names) == 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"^report: found no run, expected the folder of one"),
        (["{run}", "{run}"], r"^output: found none with 2 runs, expected a file"),
        (["{run}", "--outptu=a"], r"^report: found --outptu=a, expected folders of runs, --output and --figures"),
        (["{run}", "--rounds", "3"], r"^report: found --rounds, expected"),
        (["{run}/nowhere"], r"nowhere: found no config\.yaml, expected the folder of an earlier run"),
        (["{run}", "--output", "{run}"], r"^output: found the folder .*run, expected a file"),
        (["{run}", "--output"], r"^output: found no value, expected one"),
    ],
)
def test_what_cannot_be_used_is_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    folder = write_run(tmp_path)
    with pytest.raises(InputError, match=message):
        main([argument.format(run=folder) for argument in arguments])
    assert not (folder / "report.html").exists()
