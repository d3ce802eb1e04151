"""Files that are never seen half written, and what tells whether they are as they were written."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that readers see the old or the new content, never part of it."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(temporary, path)


def content_hash(content: bytes = b"") -> hashlib.blake2b:
    """A hash of `content`, to which more can be added; its `hexdigest` is kept beside what will be read back."""
    return hashlib.blake2b(content, digest_size=16)
