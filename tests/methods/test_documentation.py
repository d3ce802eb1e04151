"""The example of docs/methods.md works as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from fedra_engine.config.methods import METHOD_NAMES
from fedra_engine.methods.registry import METHODS
from tests.running import run_experiment

PAGE = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()


def test_the_example_method_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    module: dict[str, Any] = {"__name__": "example"}
    exec(compile(code, "docs/methods.md", "exec"), module)
    monkeypatch.setitem(METHODS, "randomprefix", module["RandomPrefix"])
    monkeypatch.setattr(METHOD_NAMES, "names", [*METHOD_NAMES.names, "randomprefix"])
    run = run_experiment(tmp_path, method={"name": "randomprefix"})
    assert (run / "summary.json").is_file()


def test_the_page_names_every_method() -> None:
    assert set(re.findall(r"^\| `(\w+)` \|", PAGE, flags=re.MULTILINE)) == set(METHODS)
