"""The files that a GPU report leaves: four, whatever happens, each whole at any time."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedra_engine.runtime.errors import InputError
from fedra_engine.runtime.files import check_own

FILES = ("report.json", "report.md", "kernels.csv", "logs.tgz")
_LARGEST_LOG = 1 << 20
"""Bytes kept of each end of a log that is longer than twice this."""


def check_output(output: Path) -> None:
    """Raises InputError if a report would replace files in the folder `output` that no report wrote."""
    first, *others = (output / name for name in FILES)
    check_own(others, first)
    try:
        content = json.loads(first.read_bytes()) if first.exists() else {"stages": []}
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict) or "stages" not in content:
        raise InputError(f"{first}: found something that no report wrote, expected another folder")


def refresh(folder: Path, output: Path, report: Mapping[str, Any], markdown: str) -> None:
    """Write `output` anew from what the stages have left in `folder` so far.

    Raises:
        OSError: a file cannot be written; it and those after it are as they were.
    """
    contents = {
        "report.json": (json.dumps(report, indent=1, ensure_ascii=False) + "\n").encode(),
        "report.md": markdown.encode(),
        "kernels.csv": _joined_csv(folder),
        "logs.tgz": _archive(folder),
    }
    # One name for all files, so that a report that is killed while it writes leaves one file more at most; and one for
    # each process, since two may write into the same folder.
    temporary = output / f".refresh-{os.getpid()}.tmp"
    try:
        for name in FILES:
            temporary.write_bytes(contents[name])
            os.replace(temporary, output / name)
    finally:
        temporary.unlink(missing_ok=True)


def _joined_csv(folder: Path) -> bytes:
    """The kernel measurements of all stages, under one header; empty where there are none."""
    parts = [path.read_bytes() for path in sorted(folder.glob("*.csv"))]
    return b"".join(part if number == 0 else part.partition(b"\n")[2] for number, part in enumerate(parts))


def _archive(folder: Path) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=6) as archive:
        for path in sorted([*folder.glob("*.log"), *folder.glob("*.json")]):
            content = path.read_bytes()
            if len(content) > 2 * _LARGEST_LOG:
                content = content[:_LARGEST_LOG] + b"\n[...]\n" + content[-_LARGEST_LOG:]
            entry = tarfile.TarInfo(path.name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()
