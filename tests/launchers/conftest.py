"""Launchers run in the process of the tests."""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

LAUNCHERS = Path(__file__).parents[2] / "launchers"


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch) -> Callable[..., object]:
    """A function that runs the launcher of a name with arguments and returns its exit code."""

    def run(name: str, *arguments: str) -> object:
        launcher = str(LAUNCHERS / f"{name}.py")
        monkeypatch.setattr(sys, "argv", [launcher, *arguments])
        with pytest.raises(SystemExit) as exited:
            runpy.run_path(launcher, run_name="__main__")
        return exited.value.code

    return run
