"""Files that are never seen half written, and what tells whether they are as they were written."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from fedra_engine.errors import InputError


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that readers see the old or the new content, never part of it."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(temporary, path)


def content_hash(content: bytes = b"") -> hashlib.blake2b:
    """A hash of `content`, to which more can be added; its `hexdigest` is kept beside what will be read back."""
    return hashlib.blake2b(content, digest_size=16)


def check_own(paths: Iterable[Path], mark: Path) -> None:
    """Check that `paths`, which are to be written, replace nothing that somebody else made.

    Args:
        paths: files or folders.
        mark: a file that the caller leaves beside what it writes, such as a lock.

    Raises:
        InputError: one of them is there and the mark is not.
    """
    if mark.is_dir():
        raise InputError(f"{mark}: found a folder, expected a file or nothing")
    if not mark.exists():
        for path in paths:
            if os.path.lexists(path):
                raise InputError(f"{path}: found something that this command did not make, expected another folder")


def check_unused(option: str, folder: Path) -> None:
    """Raises InputError unless the `folder` that an `option` names is empty, or not there."""
    try:
        used = os.path.lexists(folder) and any(folder.iterdir())
    except OSError as error:
        raise InputError(f"{option}: found {folder} ({error.strerror}), expected a new or empty folder") from error
    if used:
        raise InputError(f"{option}: found {folder} in use, expected a new or empty folder")
