"""The packages of the engine are layers: each imports only those below it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = (
    ("runtime",),
    ("config",),
    ("data",),
    ("models",),
    ("federation",),
    ("methods",),
    ("execution",),
    ("costs",),
    ("inputs",),
    ("experiment",),
    ("callback",),
    ("simulation",),
    ("exports",),
    ("callbacks",),
    ("report",),
    ("run",),
    ("studies",),
    ("commands", "__main__"),
)
"""Packages and modules of fedra_engine, from the bottom up."""
LAYER_OF = {name: layer for layer, names in enumerate(ORDER) for name in names}
OUTSIDE = {"benchmarks", "launchers", "tests", "examples"}


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imported(file: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every module of this project that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)


def test_packages_import_only_those_below_them() -> None:
    wrong = []
    for file in sources("fedra_engine"):
        package = file.relative_to(ROOT / "fedra_engine").parts[0].removesuffix(".py")
        if package == "__init__":
            continue
        for line, name in imported(file):
            parts = name.split(".")
            if parts[0] == "fedra_engine" and len(parts) > 1 and LAYER_OF.get(parts[1], -1) > LAYER_OF[package]:
                wrong.append(f"{file.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong


def test_every_package_has_its_place_in_the_order() -> None:
    there = {path.stem for path in (ROOT / "fedra_engine").iterdir() if path.suffix == ".py" or any(path.glob("*.py"))}
    assert there - {"__init__"} == set(LAYER_OF)


@pytest.mark.parametrize(("folder", "others"), [("kernels", OUTSIDE | {"fedra_engine"}), ("fedra_engine", OUTSIDE)])
def test_packages_import_nothing_of_what_is_built_on_them(folder: str, others: set[str]) -> None:
    wrong = [
        f"{file.relative_to(ROOT)}:{line} imports {name}"
        for file in sources(folder)
        for line, name in imported(file)
        if name.split(".")[0] in others and file != ROOT / "fedra_engine" / "commands" / "bench.py"
    ]
    assert not wrong


def test_importing_the_package_loads_no_torch() -> None:
    code = (
        "import sys, fedra_engine; dir(fedra_engine); "
        "from fedra_engine import ExperimentConfig, InputError; ExperimentConfig(); "
        "sys.exit(bool({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    path = f"{ROOT}:{ROOT / 'kernels'}"
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": path}, check=False).returncode == 0
