"""Which wheels must be carried to a machine that reaches no package registry, so that all of the package runs there."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from fedra_engine.runtime.errors import InputError

PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
"""pip matches each of these exactly, not what it implies."""


@dataclass(frozen=True)
class Target:
    """The machine.

    Attributes:
        installed: version of each package it has, by canonical name; None where it is not known.
        python: its Python, such as `3.12`.
        platforms: tags of the wheels it can use.
    """

    installed: Mapping[str, Version | None]
    python: str
    platforms: tuple[str, ...]

    def __post_init__(self) -> None:
        """Raises InputError for what pip would take for options, or not understand."""
        if not re.fullmatch(r"3(\.\d+){1,2}", self.python):
            raise InputError(f"python: found {self.python!r}, expected a version such as 3.12")
        for platform in self.platforms:
            if not re.fullmatch(r"\w+", platform, re.ASCII):
                raise InputError(f"platform: found {platform!r}, expected a tag such as {PLATFORMS[0]}")


def read_installed(lines: Iterable[str]) -> dict[str, Version | None]:
    """What `pip freeze` printed: `name==version`, or `name @ …`, of which only the name counts, as of a bare name.

    Raises:
        InputError: a line is neither, or has no valid version.
    """
    installed: dict[str, Version | None] = {}
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text or text.startswith(("#", "-e ")):
            continue
        match = re.fullmatch(r"([A-Za-z0-9][\w.-]*)(?:==(\S+)| @ .*)?", text)
        if match is None:
            raise InputError(f"installed: line {number}: found {text!r}, expected what `pip freeze` prints")
        try:
            installed[canonicalize_name(match[1])] = Version(match[2]) if match[2] else None
        except InvalidVersion as error:
            raise InputError(f"installed: line {number}: found {text!r}, expected a version after ==") from error
    return installed


def missing_requirements(pyproject: str, installed: Mapping[str, Version | None]) -> list[Requirement]:
    """The dependencies in a `pyproject.toml` that the machine lacks or has in another version."""
    requirements = map(Requirement, tomllib.loads(pyproject)["project"]["dependencies"])
    return [requirement for requirement in requirements if not _satisfied(requirement, installed)]


def resolve(requirements: Sequence[Requirement], target: Target) -> list[str]:
    """`name==version` of every wheel that `requirements` take beyond what the machine has. Asks pip's registry.

    Raises:
        InputError: pip finds no such wheels.
    """
    if not requirements:
        return []
    with TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        replaced = {canonicalize_name(requirement.name) for requirement in requirements}
        kept = {name: version for name, version in target.installed.items() if version and name not in replaced}
        constraints.write_text("".join(f"{name}=={version}\n" for name, version in kept.items()))
        options = ["--dry-run", "--ignore-installed", "--quiet", "--report", "-", "--constraint", str(constraints)]
        wanted = [
            *wheel_options(target),
            "--target",
            folder,
            *(f"{item.name}{_extras(item)}{item.specifier}" for item in requirements),
        ]
        report = _pip(["install", *options, *wanted])
    return lacking(json.loads(report), {name for name in target.installed if name not in replaced})


def lacking(report: Mapping[str, Any], present: set[str]) -> list[str]:
    """`name==version` of everything in pip's installation report that is not `present`, sorted."""
    found = (item["metadata"] for item in report["install"])
    return sorted(
        f"{item['name']}=={item['version']}" for item in found if canonicalize_name(item["name"]) not in present
    )


def download(wheels: Sequence[str], target: Target, folder: Path) -> dict[str, int]:
    """Have pip put `wheels` into `folder`. Returns the bytes of every wheel there.

    Raises:
        InputError: pip finds no such wheels.
    """
    if wheels:
        _pip(["download", "--quiet", "--no-deps", *wheel_options(target), "--dest", str(folder), *wheels])
    return {path.name: path.stat().st_size for path in sorted(folder.glob("*.whl"))}


def wheel_options(target: Target) -> list[str]:
    """What makes pip look for wheels of another machine."""
    platforms = [option for platform in target.platforms for option in ("--platform", platform)]
    # Some versions of pip compare what wheels require with their own Python, not with the one asked for.
    options = ["--only-binary=:all:", "--ignore-requires-python", "--implementation", "cp"]
    return [*options, "--python-version", target.python, *platforms]


def _satisfied(requirement: Requirement, installed: Mapping[str, Version | None]) -> bool:
    name = canonicalize_name(requirement.name)
    if requirement.marker is not None and not requirement.marker.evaluate({"sys_platform": "linux"}):
        return True
    if name not in installed:
        return False
    version = installed[name]
    return version is None or requirement.specifier.contains(version, prereleases=True)


def _extras(requirement: Requirement) -> str:
    return f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""


def _pip(arguments: Sequence[str]) -> str:
    ended = subprocess.run([sys.executable, "-m", "pip", *arguments], capture_output=True, text=True, check=False)
    if ended.returncode:
        errors = [line for line in ended.stderr.splitlines() if line.startswith("ERROR")]
        raise InputError(f"pip: {errors[-1] if errors else f'ended with exit code {ended.returncode}'}")
    return ended.stdout
