"""Files of the corpus of malformed inputs that are no short text: a case names its maker as `{make: repeated, …}`.

A maker gets the path, whose folder is there, and the other values of the entry.
"""

from __future__ import annotations

import base64
import gzip
import os
from pathlib import Path

from PIL import Image


def folder(path: Path) -> None:
    """An empty folder."""
    path.mkdir()


def fifo(path: Path) -> None:
    """A pipe into which nobody writes."""
    os.mkfifo(path)


def link(path: Path, to: str) -> None:
    """A symbolic link."""
    path.symlink_to(to)


def binary(path: Path, base64_text: str) -> None:
    """Bytes that are no text."""
    path.write_bytes(base64.b64decode(base64_text))


def compressed(path: Path, text: str) -> None:
    """A text under gzip."""
    path.write_bytes(gzip.compress(text.encode()))


def repeated(path: Path, text: str, times: int, before: str = "", after: str = "") -> None:
    """`before`, `times` times `text`, `after`."""
    path.write_text(before + text * times + after)


def sparse(path: Path, size: int) -> None:
    """A file of `size` zero bytes that takes no place."""
    path.touch()
    os.truncate(path, size)


def expanding_yaml(path: Path, levels: int) -> None:
    """A list of nine lists of nine lists …, by anchors and aliases: 9 ** levels entries in a few lines."""
    lines = ["l0: &l0 [a, a, a, a, a, a, a, a, a]"]
    lines += [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]" for n in range(1, levels)]
    path.write_text("\n".join([*lines, f"rounds: *l{levels - 1}\n"]))


def image(path: Path, size: int = 8, mode: str = "RGB") -> None:
    """A grey image of `size` × `size` pixels in the format of its name."""
    Image.new(mode, (size, size)).save(path)
