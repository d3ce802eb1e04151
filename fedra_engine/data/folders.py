"""What is in a folder of samples."""

from __future__ import annotations

from pathlib import Path

from fedra_engine.errors import InputError


def visible_entries(folder: Path) -> list[Path]:
    """What is in `folder`, sorted, but for hidden entries, such as macOS leaves beside every file.

    Raises:
        InputError: the folder cannot be listed, or a path is no UTF-8 text, as only such can be stored.
    """
    try:
        entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise InputError(f"data.root: cannot list {folder}: {error.strerror}; expected a readable folder") from error
    for entry in entries:
        try:
            str(entry).encode()
        except UnicodeEncodeError as error:
            raise InputError(f"data.root: found {str(entry)!r}, expected a name that is UTF-8 text") from error
    return entries
