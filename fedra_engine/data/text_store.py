"""Texts on disk: written as they are read, and memory-mapped from then on."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from tempfile import TemporaryFile
from typing import TYPE_CHECKING

from fedra_engine.data.row_cache import cache_folder
from fedra_engine.runtime.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

_AT_ONCE = 1000
_CHARACTERS_AT_ONCE = 2**22
"""Most rows and, but for the last of these, characters that wait in memory to be written."""


class TextStore:
    """Columns of texts in a file of this process alone.

    The file has no name in its folder, so nothing is left of it however the process ends.
    """

    def __init__(self, columns: Sequence[str]) -> None:
        """An empty store of these columns.

        Raises:
            InputError: the cache folder cannot be written.
        """
        import pyarrow as pa
        from datasets import Features, Value

        self._waiting: dict[str, list[str]] = {name: [] for name in columns}
        self._characters = 0
        with _writable_cache():
            cache_folder().mkdir(parents=True, exist_ok=True)
            self._file = TemporaryFile(dir=cache_folder())  # noqa: SIM115 - closed when it is mapped
            self._schema = Features({name: Value("string") for name in columns}).arrow_schema
            self._writer = pa.ipc.new_stream(self._file, self._schema)

    def append(self, row: Mapping[str, str]) -> None:
        """Add a text to every column.

        Raises:
            InputError: the disk is full.
        """
        for name, waiting in self._waiting.items():
            waiting.append(row[name])
            self._characters += len(row[name])
        if len(waiting) == _AT_ONCE or self._characters >= _CHARACTERS_AT_ONCE:
            self._write()

    def close(self) -> Dataset:
        """All rows; nothing can be added any more.

        Raises:
            InputError: the disk is full.
        """
        import pyarrow as pa
        from datasets import Dataset
        from datasets.table import InMemoryTable

        self._write()
        with _writable_cache():
            self._writer.close()
            self._file.flush()
            # The mapping outlives the file.
            with self._file, pa.memory_map(f"/dev/fd/{self._file.fileno()}") as source:
                table = pa.ipc.open_stream(source).read_all()
        # Without a fingerprint the library would make one of all rows.
        return Dataset(InMemoryTable(table), fingerprint=uuid.uuid4().hex)

    def _write(self) -> None:
        import pyarrow as pa

        arrays = [pa.array(texts, pa.string()) for texts in self._waiting.values()]
        with _writable_cache():
            self._writer.write_batch(pa.record_batch(arrays, schema=self._schema))
        for texts in self._waiting.values():
            texts.clear()
        self._characters = 0


@contextmanager
def _writable_cache() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"data: cannot write into {cache_folder()}: {error.strerror or error}; expected room in a writable cache "
            "folder (HF_DATASETS_CACHE names it)"
        ) from error
