"""Preprocessed rows in a cache on disk: cut into parts, one memory-mapped Arrow file each.

A part is named after what it was made of, so a part that is there is right, and a part is there whole or not at all.
What an interrupted run has made, the next one finds. Processes that need the same parts at the same time take turns.

Files get damaged. What is small is checked when a part is opened; rows that are arrays have checksums, which
`StoredRows` compares whenever it reads them. So a cache of any size opens at once, and damaged parts are made again.
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
"""Goes up whenever parts are laid out in another way; belongs into their names."""
ERRORS = "error"
"""The column with what is wrong with a row; empty where nothing is."""
PART_BYTES = 128 * 2**20
"""Most bytes of a part: what an interrupted run loses at most, and what is in memory while rows are made."""
_ROWS_AT_ONCE = 1000
_CHARACTERS_AT_ONCE = 2**22
"""Most texts and, but for the last of these, characters that wait in memory to be written."""
_CHECKSUM = " checksum"
"""Ends the name of the column with the checksums of the rows of another."""
_SEAL = b"fedra_engine seal"
"""Names the checksum, in the metadata, of the part's name and of all columns that have no checksums."""
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """Preprocessed rows.

    Attributes:
        columns: [rows, …] each, by name.
        errors: [rows], what is wrong with a row; empty where nothing is.
        checksums: uint64 [rows] by column, of those in a file whose rows are arrays: what they must be when read.
        make_again: makes the part anew after a row was found damaged, also in its file.
    """

    columns: dict[str, NDArray]
    errors: list[str]
    checksums: dict[str, NDArray[np.uint64]] = field(default_factory=dict)
    make_again: Callable[[], Part] | None = None


class RowMaker(Protocol):
    """Makes rows of fixed shape from samples.

    Attributes:
        what: the work in words, for progress lines, such as "decoding images".
        readable: what a sample must be, for messages, such as "a readable file".
        shapes: shape of a row of each column.
        row_bytes: size of a row.
    """

    what: str
    readable: str
    shapes: dict[str, tuple[int, ...]]
    row_bytes: int

    def identity(self, start: int, stop: int) -> str | None:
        """All that decides the rows of samples start…stop-1; None where nothing on disk stands for them."""

    def make(self, start: int, stop: int, done: Callable[[int], object]) -> Part:
        """The rows of samples start…stop-1; `done` learns how many more of them are there, from time to time."""

    def describe(self, row: int) -> str:
        """Where sample `row` is from."""


@dataclass(frozen=True)
class MadeRows:
    """All rows of a source in order.

    Attributes:
        parts: the rows.
        skipped: by row, the note in the log on a sample that could not be made.
        newly_cached: how many were made now and put into the cache, where the others were; None where none is cached.
    """

    parts: list[Part]
    skipped: dict[int, str] = field(default_factory=dict)
    newly_cached: int | None = None

    def numbers(self, column: str) -> Tensor:
        """A column with one number a row, int64 [rows]."""
        return torch.from_numpy(np.concatenate([part.columns[column] for part in self.parts]).astype(np.int64))


def make_rows(data: DomainData, maker: RowMaker, *, skip: bool) -> MadeRows:
    """Every sample's row, made or found in the cache.

    Raises:
        InputError: a sample of which no row can be made, unless `skip`; or the cache cannot be written.
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
    """First and last + 1 sample of every part; a part has samples of one domain, so that others may do without it."""
    longest = max(longest, 1)
    changes = np.flatnonzero(np.diff(data.domain_of)) + 1
    ends = [0, *changes.tolist(), len(data)]
    return [(start, min(start + longest, end)) for begin, end in pairwise(ends) for start in range(begin, end, longest)]


def cached_parts(
    keys: Sequence[str], make: Callable[[int], Part], shapes: dict[str, tuple[int, ...]]
) -> Iterator[Part]:
    """Every part from its file, or made and written there; nothing is written where `make` raises.

    Args:
        keys: name of each part, a digest of all that decides its content.
        make: makes part i.
        shapes: shape of a row of each column.

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
    """Where parts are: in the cache of the `datasets` library."""
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE) / "fedra_engine"


def store_texts(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Dataset:
    """A data set with a text in every row and column, written to disk as they are read and memory-mapped from then on.

    Its file has no name in the folder of the cache, so nothing is left of it however the process ends.

    Raises:
        InputError: the cache folder cannot be written, or the disk is full.
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
    # Without a fingerprint the library would make one of all rows.
    return Dataset(InMemoryTable(table), fingerprint=uuid.uuid4().hex)


@contextmanager
def writable_cache(target: str) -> Iterator[None]:
    """Raise InputError if writing fails inside; `target` is the file or folder in the message."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"data: cannot write {target}: {error.strerror or error}; expected room in a writable cache folder "
            "(HF_DATASETS_CACHE names it)"
        ) from error


def row_checksums(rows: NDArray) -> NDArray[np.uint64]:
    """XXH3 of each of `rows` [rows, …], which lie one behind the other; BLAKE2b where xxhash is not installed.

    An image of 224 pixels takes 5 µs on a Xeon core (30 GB/s), where zlib's CRC-32 takes 57 µs.
    """
    try:
        from xxhash import xxh3_64_intdigest
    except ImportError:
        # Nor is datasets then, so these are checksums of rows in memory, which no file keeps.
        return np.frombuffer(b"".join(blake2b(row, digest_size=8).digest() for row in rows), np.uint64)
    return np.fromiter(map(xxh3_64_intdigest, rows), np.uint64, len(rows))


def as_tensor(array: NDArray) -> Tensor:
    """`array` as a tensor that shares its memory and must not be written to."""
    with warnings.catch_warnings():
        # Memory-mapped files are read-only, which tensors cannot express.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def copy_async(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` (on the CPU) on `device`, without waiting for what is still running there."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


@dataclass(frozen=True)
class _PartFile:
    """One part on disk: its file, called as the part is, the shape of a row of each column, and what makes the part."""

    path: Path
    shapes: dict[str, tuple[int, ...]]
    make_rows: Callable[[], Part]

    def make(self, *, anew: bool = False) -> Part:
        """Make the part and write it; unless `anew`, only if no other process has done so."""
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
        """The part anew, whose rows had these checksums before some were damaged."""
        part = self.make(anew=True)
        if not all(np.array_equal(part.checksums[name], sums) for name, sums in checksums.items()):
            raise InputError(
                f"data: found rows in {self.path} that were damaged and cannot be made as they were, expected the "
                "samples and the libraries they were made with; remove the file and start a new run"
            )
        _LOG.warning("made again what was damaged in the cache: %s", self.path)
        return part

    def read(self) -> Part | None:
        """The part, arrays of rows memory-mapped and not compared; None when there is none or a damaged one."""
        import pyarrow as pa

        if not self.path.exists():
            return None
        try:
            # The mapping outlives the open file, of which there may not be too many.
            with pa.memory_map(str(self.path)) as source:
                table = pa.ipc.open_stream(source).read_all()
            # Reads no pixels or tokens, which may be anything.
            table.validate(full=True)
            columns, checksums = {}, {}
            for name, shape in self.shapes.items():
                values = table.column(name).chunk(0)
                if shape:
                    columns[name] = values.flatten().to_numpy().reshape(-1, *shape)
                    checksums[name] = table.column(name + _CHECKSUM).chunk(0).to_numpy().copy()
                else:
                    # Copied: damage that comes later must not matter to what is compared now.
                    columns[name] = values.to_numpy().copy()
            errors = table.column(ERRORS).to_pylist()
            part = Part(columns, errors, checksums, partial(self.make_again, checksums))
            return part if table.schema.metadata[_SEAL] == self._seal(part) else None
        except Exception:  # Whatever a damaged file can make pyarrow raise.
            return None

    def _write(self, part: Part) -> None:
        """Write the file so that it is there whole or not at all; the caller holds the lock."""
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
        # As the library describes them, so that it can open the file.
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
        """Checksum of all but the arrays of rows; of the name, too, so that parts cannot be mistaken for each other."""
        from xxhash import xxh3_64_hexdigest

        small = {name: values for name, values in part.columns.items() if values.ndim == 1} | part.checksums
        content = [(name, str(values.dtype), values.tobytes()) for name, values in sorted(small.items())]
        return xxh3_64_hexdigest(repr((self.path.stem, content, part.errors)).encode()).encode()
