"""The report files of a study, and text and images for them."""

from __future__ import annotations

import csv
import io
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from filelock import FileLock

from fedra_engine.callbacks.run_folder import RunFolder
from fedra_engine.runtime.errors import InputError
from fedra_engine.runtime.files import check_own, write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Item = TypeVar("Item")


@dataclass(frozen=True)
class ReportFiles:
    """Names of a study's report files, which are those of the latest command, and of their lock."""

    lock: str
    names: tuple[str, ...]

    def check(self, folder: Path) -> None:
        """Raise InputError if the folder is that of a run, or a report would replace files that no such study wrote."""
        run = RunFolder(folder)
        if run.config_file.is_file() and run.log_file.is_file():
            raise InputError(f"output_dir: found a run in {folder}, expected another folder")
        check_own(self._in(folder), folder / self.lock)

    def write(self, folder: Path, *contents: str | bytes) -> None:
        """Write the `contents`, one for each name."""
        with FileLock(folder / self.lock):
            for file, content in zip(self._in(folder), contents, strict=True):
                write_whole(file, content)

    def remove(self, folder: Path) -> None:
        """Remove the report of an earlier command."""
        with FileLock(folder / self.lock):
            for file in self._in(folder):
                file.unlink(missing_ok=True)

    def _in(self, folder: Path) -> list[Path]:
        return [folder / name for name in self.names]


def grouped(items: Iterable[Item], attribute: str) -> dict[Any, list[Item]]:
    """Group the items by the value of an attribute, in order of appearance."""
    groups: dict[Any, list[Item]] = {}
    for item in items:
        groups.setdefault(getattr(item, attribute), []).append(item)
    return groups


def csv_text(rows: Sequence[Mapping[str, object]]) -> str:
    """CSV of rows with the keys of the first; those that another one lacks are empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def png(figure: Figure, **options: Any) -> bytes:
    """The figure as a PNG; `options` are those of `savefig`."""
    content = io.BytesIO()
    figure.savefig(content, format="png", **options)
    return content.getvalue()


def command_text() -> str:
    """The command that was typed: a launcher's, or `fedra …`."""
    program, *arguments = sys.argv
    is_launcher = program.endswith(".py") and not program.endswith("__main__.py")
    return shlex.join(["python", *sys.argv] if is_launcher else ["fedra", *arguments])
