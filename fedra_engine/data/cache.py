"""The on-disk cache of preprocessed rows, in parts: one memory-mapped Arrow file each.

A part is named by a digest of its inputs and written atomically, so it is never stale or incomplete, and the parts of
an interrupted run are used by the next one. Processes that need the same parts at the same time take turns.

Damaged parts are made again. Columns of numbers are checked when a part is opened; columns of arrays have a checksum
for each row, which `StoredRows` compares at every read. So a cache of any size opens at once.
"""

from __future__ import annotations

import logging
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedra_engine.data.domain_data import DomainData
from fedra_engine.runtime.errors import InputError, first_few
from fedra_engine.runtime.files import content_hash, remove_unfinished, whole_file
from fedra_engine.runtime.stages import Stage

if TYPE_CHECKING:
    from datasets import Dataset

FORMAT = 2
"""Version of the file layout, part of every digest; to be raised when the layout changes."""
ERRORS = "error"
"""Column of error messages; empty for rows without an error."""
PART_BYTES = 128 * 2**20
"""Maximum size of a part, which is also the most work that an interrupted run loses."""
_ROWS_AT_ONCE = 1000
_CHARACTERS_AT_ONCE = 2**22
"""A batch of texts is written once it has this many rows or characters."""
_CHECKSUM = " checksum"
"""Suffix of a column of row checksums, after the name of the column that they belong to."""
_SEAL = b"fedra_engine seal"
"""Metadata key of the checksum over the part's name and its columns that have no row checksums."""
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """Preprocessed rows.

    Attributes:
        columns: [rows, …] each, by name.
        errors: [rows], error message of each row; empty for rows without an error.
        checksums: uint64 [rows], expected checksums of each column of arrays; empty unless the part is in a file.
        make_again: rewrites the part's file after a row was found damaged.
    """

    columns: dict[str, NDArray]
    errors: list[str]
    checksums: dict[str, NDArray[np.uint64]] = field(default_factory=dict)
    make_again: Callable[[], Part] | None = None


class RowMaker(Protocol):
    """Makes rows of fixed shape from samples.

    Attributes:
        what: the work, for progress lines, such as "decoding images".
        readable: what a sample is expected to be, for messages, such as "a readable file".
        shapes: shape of a row, by column.
        row_bytes: size of a row over all columns.
    """

    what: str
    readable: str
    shapes: dict[str, tuple[int, ...]]
    row_bytes: int

    def identity(self, start: int, stop: int) -> str | None:
        """Everything that determines the rows of samples start…stop-1; None if they cannot be cached."""

    def make(self, start: int, stop: int, done: Callable[[int], object]) -> Part:
        """The rows of samples start…stop-1; `done` is called with the number of rows made since its last call."""

    def describe(self, row: int) -> str:
        """Where sample `row` is from, for messages."""


@dataclass(frozen=True)
class MadeRows:
    """All rows of a source in order.

    Attributes:
        parts: the rows.
        skipped: log line for each unreadable sample, by row.
        newly_cached: number of rows that were not in the cache yet; None if the rows cannot be cached.
    """

    parts: list[Part]
    skipped: dict[int, str] = field(default_factory=dict)
    newly_cached: int | None = None

    def numbers(self, column: str) -> Tensor:
        """A column of numbers, int64 [rows]."""
        return torch.from_numpy(np.concatenate([part.columns[column] for part in self.parts]).astype(np.int64))


def make_rows(data: DomainData, maker: RowMaker, *, skip: bool) -> MadeRows:
    """The row of every sample, from the cache or newly made.

    Raises:
        InputError: a sample is unreadable and `skip` is false, or the cache cannot be written.
    """
    bounds = _cut(data, PART_BYTES // maker.row_bytes)
    skipped: dict[int, str] = {}
    made: dict[int, int] = {}

    def check(index: int, part: Part) -> None:
        for row, error in enumerate(part.errors, start=bounds[index][0]):
            if error and not skip:
                raise InputError(
                    f"{data.given_as}: cannot read {maker.describe(row)}: {error}; expected {maker.readable}, or "
                    "data.unreadable skip"
                )
            if error:
                skipped[row] = f"{maker.describe(row)}: skipped, {error}"

    def make(index: int) -> Part:
        part = maker.make(*bounds[index], stage.advance)
        made[index] = len(part.errors)
        check(index, part)
        return part

    with Stage("looking for samples in the cache"):
        identities = [maker.identity(start, stop) for start, stop in bounds]
        keys = [content_hash(f"{FORMAT} {identity}".encode()).hexdigest() for identity in identities]
        is_cached = None not in identities
    parts = []
    with Stage(maker.what, len(data)) as stage:
        found = cached_parts(keys, make, maker.shapes) if is_cached else map(make, range(len(bounds)))
        for index, part in enumerate(found):
            if index not in made:
                stage.advance(len(part.errors))
                check(index, part)
            parts.append(part)
    return MadeRows(parts, skipped, sum(made.values()) if is_cached else None)


def _cut(data: DomainData, longest: int) -> list[tuple[int, int]]:
    """(start, stop) of every part. A part has one domain, so that a run with fewer domains can use it too."""
    longest = max(longest, 1)
    changes = np.flatnonzero(np.diff(data.domain_of)) + 1
    ends = [0, *changes.tolist(), len(data)]
    return [(start, min(start + longest, end)) for begin, end in pairwise(ends) for start in range(begin, end, longest)]


def cached_parts(
    keys: Sequence[str], make: Callable[[int], Part], shapes: dict[str, tuple[int, ...]]
) -> Iterator[Part]:
    """Read every part from its file, or make and write it; nothing is written where `make` raises.

    Args:
        keys: name of each part, a digest of everything that determines its content.
        make: makes part i.
        shapes: shape of a row, by column.

    Raises:
        InputError: the cache cannot be written.
    """
    damaged = []
    for index, key in enumerate(keys):
        file = _PartFile(cache_folder() / f"{key}.arrow", shapes, partial(make, index))
        part = file.read()
        if part is None:
            damaged += [str(file.path)] if file.path.exists() else []
            part = file.make()
        yield part
    if damaged:
        _LOG.warning("made again what was damaged in the cache: %s", first_few(damaged, 1))


def cache_folder() -> Path:
    """The folder of the parts, inside the cache of the `datasets` library."""
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE) / "fedra_engine"


def store_texts(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Dataset:
    """Write rows of texts to disk as they arrive, and return them as a memory-mapped data set.

    The file is anonymous (it has no directory entry), so nothing is left of it however the process ends.

    Raises:
        InputError: the cache cannot be written.
    """
    import pyarrow as pa
    from datasets import Dataset, Features, Value
    from datasets.table import InMemoryTable

    def write() -> None:
        arrays = [pa.array([row[index] for row in waiting], pa.string()) for index in range(len(columns))]
        with writable_cache(f"into {cache_folder()}"):
            writer.write_batch(pa.record_batch(arrays, schema=schema))

    schema = Features({name: Value("string") for name in columns}).arrow_schema
    with writable_cache(f"into {cache_folder()}"):
        cache_folder().mkdir(parents=True, exist_ok=True)
        file = TemporaryFile(dir=cache_folder())  # noqa: SIM115 - closed when it is mapped
        writer = pa.ipc.new_stream(file, schema)
    waiting, characters = list[Sequence[str]](), 0
    for row in rows:
        waiting.append(row)
        characters += sum(map(len, row))
        if len(waiting) == _ROWS_AT_ONCE or characters >= _CHARACTERS_AT_ONCE:
            write()
            waiting, characters = [], 0
    write()
    with writable_cache(f"into {cache_folder()}"):
        writer.close()
        file.flush()
        # The mapping outlives the file.
        with file, pa.memory_map(f"/dev/fd/{file.fileno()}") as mapped:
            table = pa.ipc.open_stream(mapped).read_all()
    # Without a fingerprint the library would hash all rows.
    return Dataset(InMemoryTable(table), fingerprint=uuid.uuid4().hex)


@contextmanager
def writable_cache(target: str) -> Iterator[None]:
    """Turn an OSError into an InputError whose message names the file or folder `target`."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"data: cannot write {target}: {error.strerror or error}; expected room in a writable cache folder "
            "(HF_DATASETS_CACHE names it)"
        ) from error


def row_checksums(rows: NDArray) -> NDArray[np.uint64]:
    """XXH3 of each row of the contiguous `rows` [rows, …], [rows]; BLAKE2b if xxhash is not installed.

    An image of 224 pixels takes 5 µs on a Xeon core (30 GB/s), where zlib's CRC-32 takes 57 µs.
    """
    try:
        from xxhash import xxh3_64_intdigest
    except ImportError:
        # xxhash comes with datasets, without which there is no cache: no file is checked by these.
        return np.frombuffer(b"".join(blake2b(row, digest_size=8).digest() for row in rows), np.uint64)
    return np.fromiter(map(xxh3_64_intdigest, rows), np.uint64, len(rows))


def as_tensor(array: NDArray) -> Tensor:
    """A tensor that shares the memory of `array` and must not be written to."""
    with warnings.catch_warnings():
        # Memory-mapped files are read-only, which tensors cannot express.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def copy_async(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to `device` without waiting for the kernels that run there."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


@dataclass(frozen=True)
class _PartFile:
    """The file of one part, the shape of a row of each column, and the function that makes the part."""

    path: Path
    shapes: dict[str, tuple[int, ...]]
    make_rows: Callable[[], Part]

    def make(self, *, anew: bool = False) -> Part:
        """Make and write the part; unless `anew`, only if no other process has done so meanwhile."""
        from filelock import FileLock

        with writable_cache(str(self.path)):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self.path.parent / "lock"):
                part = None if anew else self.read()
                if part is None:
                    self._write(self.make_rows())
                    part = self.read()
        assert part is not None
        return part

    def make_again(self, checksums: dict[str, NDArray[np.uint64]]) -> Part:
        """Rewrite a damaged part, whose rows must get their former `checksums` again."""
        part = self.make(anew=True)
        if not all(np.array_equal(part.checksums[name], sums) for name, sums in checksums.items()):
            raise InputError(
                f"data: found rows in {self.path} that were damaged and cannot be made as they were, expected the "
                "samples and the libraries they were made with; remove the file and start a new run"
            )
        _LOG.warning("made again what was damaged in the cache: %s", self.path)
        return part

    def read(self) -> Part | None:
        """The part, or None if it is missing or damaged; arrays are memory-mapped, and not compared yet."""
        import pyarrow as pa

        if not self.path.exists():
            return None
        try:
            # The mapping outlives the file, which is closed because a process may open only so many.
            with pa.memory_map(str(self.path)) as source:
                table = pa.ipc.open_stream(source).read_all()
            # Does not read pixels or tokens.
            table.validate(full=True)
            columns, checksums = {}, {}
            for name, shape in self.shapes.items():
                values = table.column(name).chunk(0)
                if shape:
                    columns[name] = values.flatten().to_numpy().reshape(-1, *shape)
                    checksums[name] = table.column(name + _CHECKSUM).chunk(0).to_numpy().copy()
                else:
                    # Copied, as damage after this check would go unnoticed.
                    columns[name] = values.to_numpy().copy()
            errors = table.column(ERRORS).to_pylist()
            part = Part(columns, errors, checksums, partial(self.make_again, checksums))
            return part if table.schema.metadata[_SEAL] == self._seal(part) else None
        except Exception:  # Whatever a damaged file can make pyarrow raise.
            return None

    def _write(self, part: Part) -> None:
        """Write the file atomically; the caller holds the lock."""
        import pyarrow as pa
        from datasets import Features

        remove_unfinished(self.path.parent)
        checksums = {name: row_checksums(values) for name, values in part.columns.items() if values.ndim > 1}
        columns = part.columns | {name + _CHECKSUM: values for name, values in checksums.items()}
        arrays = {
            name: pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), int(np.prod(values.shape[1:])))
            if values.ndim > 1
            else pa.array(values)
            for name, values in columns.items()
        }
        arrays[ERRORS] = pa.array(part.errors, pa.string())
        # With the metadata that lets the datasets library open the file.
        plain = pa.schema([(name, values.type) for name, values in arrays.items()])
        schema = Features.from_arrow_schema(plain).arrow_schema
        seal = {_SEAL: self._seal(replace(part, checksums=checksums))}
        batch = pa.record_batch(list(arrays.values()), schema=schema.with_metadata({**schema.metadata, **seal}))
        with (
            whole_file(self.path) as unfinished,
            pa.OSFile(str(unfinished), "wb") as sink,
            pa.ipc.new_stream(sink, batch.schema) as writer,
        ):
            writer.write_batch(batch)

    def _seal(self, part: Part) -> bytes:
        """Checksum of all but the columns of arrays; it includes the name, so that no part passes for another."""
        from xxhash import xxh3_64_hexdigest

        small = {name: values for name, values in part.columns.items() if values.ndim == 1} | part.checksums
        content = [(name, str(values.dtype), values.tobytes()) for name, values in sorted(small.items())]
        return xxh3_64_hexdigest(repr((self.path.stem, content, part.errors)).encode()).encode()
