"""The example of docs/howto/own_method.md works as it stands, and docs/methods.md names all that there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fedra_engine.methods.allocators import ALLOCATORS
from fedra_engine.methods.registry import METHODS
from tests.documented import BLOCKS
from tests.running import run_experiment

pytestmark = pytest.mark.slow

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "methods.md").read_text()


@pytest.mark.usefixtures("own_names")
def test_the_example_method_trains(tmp_path: Path) -> None:
    page = DOCS / "howto" / "own_method.md"
    code = next(block.code for block in BLOCKS if block.page.endswith(page.name) and "randomprefix" in block.code)
    exec(compile(code, str(page), "exec"), {"__name__": "example"})
    run = run_experiment(tmp_path, method={"name": "randomprefix"})
    assert (run / "summary.json").is_file()


def test_the_page_names_every_method() -> None:
    assert set(re.findall(r"^\| `(\w+)` \|", PAGE, flags=re.MULTILINE)) == set(METHODS)


def test_the_page_names_every_allocation() -> None:
    section = PAGE.split("## Who holds what: allocations")[1].split("\n## ")[0]
    assert re.findall(r"^\| (?!allocation)(\w+) ", section, flags=re.MULTILINE) == [*ALLOCATORS]
