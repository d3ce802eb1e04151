"""What the reports of all studies share."""

import sys

import pytest

from fedra_engine.studies.report import command_text


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
