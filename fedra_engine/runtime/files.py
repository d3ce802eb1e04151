"""Files and folders that appear whole or not at all, and that outlast a power cut once they are there.

What is unfinished has a name that starts with a dot and ends in `.tmp`; what a killed process left of it is in nobody's
way. Whatever cannot be written is an OSError that names it. Also here: hashes that tell whether content is as it was
written, and checks that no command replaces what another made.
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
    """Write a file so that readers see the old or the new content, never part of it."""
    with whole_file(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file to write, which takes the place of `path` at the end."""
    temporary = path.with_name(f".{path.name}{_UNFINISHED}")
    with writing(path):
        try:
            temporary.unlink(missing_ok=True)
            temporary.touch()
            # Libraries may make files that only their owner can read.
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
    """An empty folder to write files in, each of which takes the place of its name in `folder` at the end."""
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
    """An empty folder to fill with files, which becomes `path` at the end; FileExistsError if something is there."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}{_UNFINISHED}")
    with writing(path):
        temporary.mkdir()
        try:
            yield temporary
            for file in temporary.iterdir():
                _sync(file)
            _sync(temporary)
            # Renaming refuses all that may be there but an empty folder, which it replaces.
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
    """Make a folder, and those above it, where there is none."""
    if path.is_dir():
        return
    make_folders(path.parent)
    with writing(path):
        path.mkdir(exist_ok=True)
        _sync(path.parent)


def remove_unfinished(folder: Path) -> None:
    """Remove what killed processes left unfinished in `folder`; no other process may be writing there."""
    for path in folder.glob(f".*{_UNFINISHED}"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Make whatever says that something cannot be written an OSError that names `path`."""
    try:
        yield
    except OSError as error:
        # Some libraries give no number.
        raise OSError(error.errno or errno.EIO, error.strerror or one_line(error), str(path)) from error
    except Exception as error:
        # Libraries written in Rust have exceptions of their own, which end like this.
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def content_hash(content: bytes = b"") -> hashlib.blake2b:
    """A hash of `content`, to which more can be added; its `hexdigest` is kept beside what will be read back."""
    return hashlib.blake2b(content, digest_size=16)


def check_regular(file: Path | str) -> None:
    """Raise OSError if `file` is none, or something that reading could wait for without end, such as a pipe."""
    if not stat.S_ISREG(os.stat(file).st_mode):
        raise OSError(errno.EINVAL, "it is no regular file")


def check_own(paths: Iterable[Path], mark: Path) -> None:
    """Raises InputError if writing to `paths` would replace what somebody else made.

    The caller leaves the file `mark`, such as a lock, beside what it writes itself.
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


def _sync(path: Path) -> None:
    """Return once the content of a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems keep no order of names to wait for.
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(descriptor)
