"""What must be carried to a machine without registries: what the package needs and that machine lacks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.version import Version

from benchmarks import offline_wheels
from benchmarks.offline_wheels import (
    PLATFORMS,
    Target,
    lacking,
    missing_requirements,
    read_installed,
    resolve,
    wheel_options,
)
from fedra_engine.runtime.errors import InputError

ROOT = Path(__file__).parents[2]
PYPROJECT = """
[project]
dependencies = [
    "datasets>=4.0",
    "jsonargparse[signatures]>=4.49",
    "numpy>=2.0",
    "typing_extensions",
    "mac; sys_platform == 'darwin'",
]
"""
REPORT = {
    "install": [
        {"metadata": {"name": name, "version": "1.0"}} for name in ("xxhash", "numpy", "Docstring_Parser", "datasets")
    ]
}


def test_frozen_packages_are_read_by_canonical_name() -> None:
    found = read_installed(
        ["# made there", "Typing_Extensions==4.16.0", "torch==2.11.0+cu130", "x @ file:///x", "", "y"]
    )
    assert found == {"typing-extensions": Version("4.16.0"), "torch": Version("2.11.0+cu130"), "x": None, "y": None}


def test_a_line_that_is_none_of_pips_is_named() -> None:
    with pytest.raises(InputError, match=r"installed: line 2: found 'what is this', expected what `pip freeze` prints"):
        read_installed(["numpy==2.5.0", "what is this"])


@pytest.mark.parametrize(
    ("installed", "missing"),
    [
        (["numpy==2.5.5", "typing-extensions==4.16.0"], ["datasets>=4.0", "jsonargparse[signatures]>=4.49"]),
        (["numpy==1.26", "typing_extensions", "datasets==4.0", "jsonargparse==4.53"], ["numpy>=2.0"]),
        (["numpy", "typing_extensions", "datasets==3.9", "jsonargparse==4.53"], ["datasets>=4.0"]),
    ],
)
def test_what_is_absent_or_too_old_is_missing(installed: list[str], missing: list[str]) -> None:
    assert [str(item) for item in missing_requirements(PYPROJECT, read_installed(installed))] == missing


def test_only_what_the_machine_lacks_is_carried() -> None:
    assert lacking(REPORT, {"numpy", "docstring-parser"}) == ["datasets==1.0", "xxhash==1.0"]


def test_pip_is_asked_for_the_machines_python_and_may_not_change_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def pip(arguments: list[str]) -> str:
        asked["arguments"] = arguments
        asked["constraints"] = Path(arguments[arguments.index("--constraint") + 1]).read_text()
        return '{"install": [{"metadata": {"name": "datasets", "version": "5.2.0"}}]}'

    monkeypatch.setattr(offline_wheels, "_pip", pip)
    target = Target(read_installed(["numpy==2.5.5", "datasets==3.0", "typing_extensions"]), "3.13", PLATFORMS)
    assert resolve(missing_requirements(PYPROJECT, target.installed), target) == ["datasets==5.2.0"]
    assert asked["constraints"] == "numpy==2.5.5\n"
    assert asked["arguments"][-2:] == ["datasets>=4.0", "jsonargparse[signatures]>=4.49"]
    options = wheel_options(target)
    assert options[options.index("--python-version") + 1] == "3.13"
    assert [option for option in options if option.startswith("manylinux")] == list(PLATFORMS)
    assert set(options) <= set(asked["arguments"])


def test_nothing_is_asked_for_where_nothing_is_missing() -> None:
    assert resolve([], Target({}, "3.12", PLATFORMS)) == []


def test_a_machine_that_lacks_nothing_is_told_so_beside_an_empty_list(tmp_path: Path) -> None:
    requirements = missing_requirements((ROOT / "pyproject.toml").read_text(), {})
    (tmp_path / "machine.txt").write_text("".join(f"{requirement.name}\n" for requirement in requirements))
    command = [sys.executable, str(ROOT / "launchers" / "offline_wheels.py"), str(tmp_path / "machine.txt")]
    ended = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert (ended.returncode, ended.stdout) == (0, "")
    assert ended.stderr.endswith("nothing is missing\n")


def test_pips_complaint_is_one_line() -> None:
    with pytest.raises(InputError, match=r"^pip: "):
        offline_wheels._pip(["install", "--no-index", "--dry-run", "no-such-package-anywhere"])
