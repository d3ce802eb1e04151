"""Arguments of the commands without an experiment."""

from pathlib import Path

import pytest

from benchmarks.line_parser import path


def test_a_path_may_begin_at_home_for_every_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/homes/me")
    assert path("~/results") == Path("/homes/me/results")
