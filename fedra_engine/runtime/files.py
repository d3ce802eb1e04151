"""Atomic, durable writing of files and folders; content hashes; checks against overwriting another command's files.

Unfinished files and folders have names that start with a dot and end in `.tmp`; those of killed processes do no harm.
All errors of writing are OSErrors that name the file.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedra_engine.runtime.errors import InputError, one_line

_UNFINISHED = ".tmp"


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file atomically: readers see either the old or the new content."""
    with whole_file(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file to write, which replaces `path` at the end."""
    temporary = path.with_name(f".{path.name}{_UNFINISHED}")
    with writing(path):
        try:
            temporary.unlink(missing_ok=True)
            temporary.touch()
            # Libraries may replace the file by one that only its owner can read.
            mode = temporary.stat().st_mode
            yield temporary
            temporary.chmod(mode)
            _sync(temporary)
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        _sync(path.parent)


@contextmanager
def whole_files(folder: Path) -> Iterator[Path]:
    """An empty folder to write files into, which replace those of the same names in `folder` at the end."""
    make_folders(folder)
    with writing(folder):
        temporary = folder / f".new{_UNFINISHED}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            yield temporary
            for made in sorted(temporary.iterdir()):
                with whole_file(folder / made.name) as file:
                    os.replace(made, file)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """An empty folder to fill with files, which becomes `path` at the end; FileExistsError if that exists."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}{_UNFINISHED}")
    with writing(path):
        temporary.mkdir()
        try:
            yield temporary
            for file in temporary.iterdir():
                _sync(file)
            _sync(temporary)
            # Renaming would replace an empty folder.
            if os.path.lexists(path):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
            try:
                os.rename(temporary, path)
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.ENOTDIR):
                    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from error
                raise
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _sync(path.parent)


def make_folders(path: Path) -> None:
    """Make a folder and its parents, unless they exist."""
    if path.is_dir():
        return
    make_folders(path.parent)
    with writing(path):
        path.mkdir(exist_ok=True)
        _sync(path.parent)


def remove_unfinished(folder: Path) -> None:
    """Remove the unfinished files of killed processes from `folder`; no other process may be writing there."""
    for path in folder.glob(f".*{_UNFINISHED}"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn errors of writing into an OSError that names `path`."""
    try:
        yield
    except OSError as error:
        # Some libraries give no error number.
        raise OSError(error.errno or errno.EIO, error.strerror or one_line(error), str(path)) from error
    except Exception as error:
        # Libraries written in Rust raise their own exceptions, with a message that ends like this.
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def content_hash(content: bytes = b"") -> hashlib.blake2b:
    """A hash object of `content`, to which more can be added."""
    return hashlib.blake2b(content, digest_size=16)


def check_regular(file: Path | str) -> None:
    """Raise OSError if `file` does not exist, or is not a regular file: reading a pipe could wait forever."""
    if not stat.S_ISREG(os.stat(file).st_mode):
        raise OSError(errno.EINVAL, "it is no regular file")


def check_own(paths: Iterable[Path], mark: Path) -> None:
    """Raise InputError if writing to `paths` would replace files that this command did not make.

    The file `mark`, such as a lock, which the caller writes beside `paths`, shows that it made them.
    """
    if mark.is_dir():
        raise InputError(f"{mark}: found a folder, expected a file or nothing")
    if not mark.exists():
        for path in paths:
            if os.path.lexists(path):
                raise InputError(f"{path}: found something that this command did not make, expected another folder")


def check_unused(option: str, folder: Path) -> None:
    """Raise InputError unless the `folder` that an `option` names is empty or does not exist."""
    try:
        used = os.path.lexists(folder) and any(folder.iterdir())
    except OSError as error:
        raise InputError(f"{option}: found {folder} ({error.strerror}), expected a new or empty folder") from error
    if used:
        raise InputError(f"{option}: found files in {folder}, expected a new or empty folder")


def _sync(path: Path) -> None:
    """Wait until the content of a file, or the entries of a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot sync a folder.
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(descriptor)
