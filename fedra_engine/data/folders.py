"""What is in a folder of samples."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path

from fedra_engine.runtime.errors import InputError, first_few

_SYSTEM_FILES = frozenset({"thumbs.db", "desktop.ini"})
"""What Windows leaves in folders, where other systems leave hidden files."""
_NAMED = 3
"""Files that are named of those that are left out; the others are counted."""


def visible_entries(folder: Path) -> list[Path]:
    """What is in `folder`, sorted, but for what operating systems leave there, such as hidden files beside every file.

    Raises:
        InputError: the folder cannot be listed, or a path is no UTF-8 text, as only such can be stored.
    """
    try:
        entries = sorted(entry for entry in folder.iterdir() if not _is_hidden(entry.name))
    except OSError as error:
        raise InputError(f"data.root: cannot list {folder}: {error.strerror}; expected a readable folder") from error
    for entry in entries:
        try:
            str(entry).encode()
        except UnicodeEncodeError as error:
            raise InputError(f"data.root: found {str(entry)!r}, expected a name that is UTF-8 text") from error
    return entries


def check_chosen(domains: Iterable[str], present: Collection[str], folder: Path) -> None:
    """Raise InputError unless all `domains` are among the names `present` in `folder`, so that none leads out of it."""
    for domain in domains:
        if domain not in present:
            raise InputError(f"data.domains: found {domain!r}, expected some of those in {folder}: {sorted(present)}")


def left_out_notes(root: Path, entries: Iterable[Path], expected: str) -> list[str]:
    """A note, for people, on files that no sample is made of; none if there are none.

    Args:
        root: their paths are shown below it.
        entries: the files, and folders of which all files count.
        expected: what would have been read.
    """
    files = sorted(file for entry in entries for file in files_below(entry))
    if not files:
        return []
    kinds = Counter(file.suffix.lower() or "without suffix" for file in files)
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    names = first_few([str(file.relative_to(root)) for file in files], _NAMED)
    return [f"warning: {root}: left out {counts}: {names}; expected {expected}"]


def files_below(entry: Path) -> list[Path]:
    """The file `entry`, or all visible files below this folder."""
    # A link to a folder is not followed, as it may lead back.
    if not os.path.isdir(entry) or os.path.islink(entry):
        return [entry]
    found = []
    for above, folders, files in os.walk(entry):
        folders[:] = sorted(name for name in folders if not _is_hidden(name))
        found += [Path(above, name) for name in sorted(files) if not _is_hidden(name)]
    return found


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _SYSTEM_FILES
