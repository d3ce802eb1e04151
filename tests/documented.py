"""The blocks of code in README and docs: how they are found, what they start, and which of them no test can run."""

from __future__ import annotations

import os
import re
import subprocess
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

NOT_RUN = {
    "make ": "sets up an environment, or runs these tests",
    "python -m pip ": "asks a package registry",
    "python3 -m webbrowser ": "opens a browser",
    "python launchers/offline_wheels.py ": "downloads from a package registry",
    "python launchers/gpu_report.py ": "needs a GPU; its rehearsal is run in tests/benchmarks/gpu",
    "fedra bench peers": "takes half an hour; tests/benchmarks/peers runs small settings",
    "fedra bench executors": "takes minutes; tests/benchmarks/test_rounds.py runs its parts",
    "fedra simulate --config domainnet_vit_b16 ": "has its model from the hub; tests/data/test_protocols.py runs it on "
    "small data",
    "accelerate launch --config_file configs/accelerate/zero3.yaml ": "needs GPUs, and its model is from the hub; "
    "tests/distributed runs sharded models",
    "srun ": "needs SLURM",
    "root: databricks/": "has its data from the hub; tests/data/test_protocols.py runs it on small data",
}
"""How a command, or a line of a configuration, begins that is read and checked but not run, and why."""

RUN_ELSEWHERE = {
    "# examples/": "tests/test_examples.py",
    "from fedra_engine import ExperimentConfig, simulate": "tests/test_examples.py",
    "import json\n\nfrom peft import": "tests/test_simulation.py",
    '"""Random prefixes': "tests/methods/test_documentation.py",
}
"""How a block of Python begins, and the test that runs it."""

IN_BRACKETS = {"<PACS>": "PACS", "<ViT-S/14>": "VIT"}
"""How pages of results name what other pages name in capitals: something of the reader's."""

LANGUAGES = ("sh", "bash", "python", "yaml", "text")
_STARTED = ("fedra", "python", "python3", "make", "torchrun", "accelerate", "srun", "scontrol")
"""Programs that blocks start; anything else must be the shell's own."""
_STUB = """#!/bin/sh
{ printf '%s\\0' "${0##*/}" "$PWD" "$@"; printf '\\n\\0'; } >> "$STARTED"
"""


class Block(NamedTuple):
    """A block of code.

    Attributes:
        page: its file, from the root of the repository.
        line: where it begins.
        language: as the page says; `sh` for indented blocks and, in `docs/results`, for those that do not say it.
        code: without the page's indentation.
    """

    page: str
    line: int
    language: str
    code: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


class Started(NamedTuple):
    """A command that a block starts: the program with its arguments, and the folder it starts in."""

    command: list[str]
    folder: Path

    def __str__(self) -> str:
        return " ".join(self.command)


def blocks(page: Path) -> Iterator[Block]:
    """The blocks of a page: those between fences, and indented ones that start a program."""
    text, name = page.read_text(encoding="utf-8"), str(page.relative_to(ROOT))
    fenced = rf"^( *)```(\w*)\n(.*?)^\1```$|^\n((?: {{4}}(?:{'|'.join(_STARTED)}) [^\n]*\n)+)"
    for match in re.finditer(fenced, text, flags=re.DOTALL | re.MULTILINE):
        _, language, code, indented = match.groups()
        line = text[: match.start()].count("\n") + 1
        code = textwrap.dedent(indented if code is None else code)
        for here, there in IN_BRACKETS.items():
            code = code.replace(here, there)
        yield Block(name, line, language or ("sh" if indented or page.parent.name == "results" else ""), code)


BLOCKS = [block for page in PAGES for block in blocks(page)]


def started(code: str, folder: Path) -> list[Started]:
    """What a shell starts when it runs `code` in `folder`; nothing but the shell itself is really run."""
    programs, record = folder / ".programs", folder / ".started"
    if not programs.exists():
        programs.mkdir()
        for program in _STARTED:
            (programs / program).write_text(_STUB)
            (programs / program).chmod(0o755)
    record.write_bytes(b"")
    environment = {"STARTED": str(record), "PATH": f"{programs}:{os.defpath}", "PACS": "PACS", "VIT": "VIT"}
    environment |= {"SLURM_GPUS_ON_NODE": "4", "SLURM_NNODES": "1", "SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "a"}
    script = "set -euo pipefail\n" + code
    done = subprocess.run(["bash", "-c", script], cwd=folder, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    found = []
    for entry in record.read_text().split("\n\0")[:-1]:
        program, where, *arguments = entry.split("\0")[:-1]
        found.append(Started([program, *arguments], Path(where)))
    return found


def reason_not_to_run(started: Started | str) -> str | None:
    """Why `NOT_RUN` leaves out a command or a line of a configuration; None if it does not."""
    text = f"{started} "
    return next((why for begin, why in NOT_RUN.items() if text.strip().startswith(begin.strip())), None)


def engine_command(command: Sequence[str]) -> tuple[str, list[str]] | None:
    """The command of `fedra` that a command line comes to, with its arguments; None if it comes to none."""
    program, *rest = command
    if program == "fedra":
        return rest[0], rest[1:]
    launchers = {"simulate": "simulate", "compare": "compare", "scaling": "scale", "microbench": "bench"}
    for index, argument in enumerate(rest):
        if match := re.fullmatch(r"launchers/(\w+)\.py", argument):
            return (launchers[match[1]], rest[index + 1 :]) if match[1] in launchers else None
    return None
