"""The example of docs/methods.md works as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fedra_engine.methods.allocators import ALLOCATORS
from fedra_engine.methods.registry import METHODS
from tests.running import run_experiment

pytestmark = pytest.mark.slow

PAGE = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()


@pytest.mark.usefixtures("own_names")
def test_the_example_method_trains(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    exec(compile(code, "docs/methods.md", "exec"), {"__name__": "example"})
    run = run_experiment(tmp_path, method={"name": "randomprefix"})
    assert (run / "summary.json").is_file()


def test_the_page_names_every_method() -> None:
    assert set(re.findall(r"^\| `(\w+)` \|", PAGE, flags=re.MULTILINE)) == set(METHODS)


def test_the_page_names_every_allocation() -> None:
    section = PAGE.split("## Who holds what: allocations")[1].split("\n## ")[0]
    assert re.findall(r"^\| (?!allocation)(\w+) ", section, flags=re.MULTILINE) == [*ALLOCATORS]
