"""The environments of the contestants that are other people's packages: a folder each, made when it is first needed.

Each has what its list in `benchmarks/peers/environments` pins. Torch, transformers, PEFT and what else the lists do not
name come from the environment of this process, so that all contestants compute with the same libraries.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from fedra_engine.runtime.errors import InputError, one_line

ROOT = Path(__file__).parents[2]
_LISTS = Path(__file__).parent / "environments"
_FOLDER = ROOT / "build" / "peers"
OURS = ""
"""The environment of this process."""


def python_of(name: str) -> Path:
    """Python of the environment `name`, which is made anew if its list, or what it shares, has changed.

    Raises:
        InputError: a package cannot be installed.
    """
    if name == OURS:
        return Path(sys.executable)
    folder, packages = _FOLDER / name, _LISTS / f"{name}.txt"
    python, stamp = folder / "bin" / "python", folder / "made_of.txt"
    shared = sysconfig.get_path("purelib")
    made_of = f"{shared}\n{packages.read_text(encoding='utf-8')}"
    if not stamp.is_file() or stamp.read_text(encoding="utf-8") != made_of:
        print(f"making the environment of {name} …", file=sys.stderr, flush=True)
        venv.create(folder, clear=True, symlinks=True)
        _install(python, packages)
        # Behind the packages of the environment itself, which go first.
        own = folder / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
        (own / "shared.pth").write_text(f"{shared}\n", encoding="utf-8")
        stamp.write_text(made_of, encoding="utf-8")
    return python


def _install(python: Path, packages: Path) -> None:
    """Install exactly what the list names: dependencies that it lacks are shared, and torch would be gigabytes."""
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-compile"]
    done = subprocess.run(
        [*command, "--quiet", "--requirement", str(packages)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise InputError(
            f"peers: found packages of {packages.name} that pip cannot install: {one_line(Exception(last))}"
        )


def version_of(name: str, package: str) -> str:
    """The version of `package` that the list of the environment `name` pins."""
    lines = (_LISTS / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    (version,) = (line.partition("==")[2] for line in lines if line.partition("==")[0] == package)
    return version
