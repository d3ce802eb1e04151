"""A cache on disk of preprocessed rows, one memory-mapped Arrow file per part.

A part is named after what it was made of, so a part that is there is right, and a part is there whole or not at all.
What an interrupted run has made, the next one finds. Processes that need the same parts at the same time take turns.

Files get damaged. What is small is checked when a part is opened; rows that are arrays have checksums, which
`StoredRows` compares whenever it reads them. So a cache of any size opens at once, and damaged parts are made again.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedra_engine.runtime.errors import InputError, first_few
from fedra_engine.runtime.files import remove_unfinished, whole_file

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Features

FORMAT = 2
"""Goes up whenever parts are laid out in another way; belongs into their names."""
ERRORS = "error"
"""The column with what is wrong with a row; empty where nothing is."""
_CHECKSUM = " checksum"
"""Ends the name of the column with the checksums of the rows of another."""
_SEAL = b"fedra_engine seal"
"""Names the checksum, in the metadata, of the part's name and of all columns that have no checksums."""
_SUFFIX = ".arrow"
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


def cached_parts(
    keys: Sequence[str],
    make: Callable[[int], Part],
    shapes: dict[str, tuple[int, ...]],
    check: Callable[[int, Part], None],
    made: Callable[[int], None],
) -> list[Part]:
    """Every part from its file, or made and written there.

    Args:
        keys: name of each part, a digest of all that decides its content.
        make: makes part i.
        shapes: shape of a row of each column.
        check: called with every part before it is written or used; may raise.
        made: called with i once part i is there.

    Raises:
        InputError: the cache cannot be written.
    """
    parts, damaged = [], []
    for index, key in enumerate(keys):
        path = cache_folder() / f"{key}{_SUFFIX}"
        file = _PartFile(path, shapes, partial(make, index), partial(check, index))
        part = file.read()
        if part is None:
            damaged += [path] if path.exists() else []
            part = file.make()
        else:
            check(index, part)
        parts.append(replace(part, make_again=partial(file.make_again, part)))
        made(index)
    if damaged:
        _LOG.warning("made again what was damaged in the cache: %s", first_few(list(map(str, damaged)), 1))
    return parts


def cache_folder() -> Path:
    """Where parts are: in the cache of the `datasets` library."""
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE) / "fedra_engine"


def as_tensor(array: NDArray) -> Tensor:
    """`array` as a tensor that shares its memory and must not be written to."""
    with warnings.catch_warnings():
        # Memory-mapped files are read-only, which tensors cannot express.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


@dataclass(frozen=True)
class _PartFile:
    """One part on disk.

    Attributes:
        path: of the file; its name without the suffix is the part's.
        shapes: shape of a row of each column.
        make_rows: makes the part.
        check: called before the part is written; may raise.
    """

    path: Path
    shapes: dict[str, tuple[int, ...]]
    make_rows: Callable[[], Part]
    check: Callable[[Part], None]

    def make(self, whole: Callable[[Part], bool] = lambda part: True) -> Part:
        """Make the part and write it, unless another process has done so and the part is `whole`."""
        from filelock import FileLock

        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self.path.parent / "lock"):
                part = self.read()
                if part is None or not whole(part):
                    part = self.make_rows()
                    self.check(part)
                    self._write(part)
                    part = self.read()
        except OSError as error:
            raise InputError(
                f"data: cannot write {self.path}: {error.strerror or error}; expected room in a writable cache folder "
                "(HF_DATASETS_CACHE names it)"
            ) from error
        assert part is not None
        return part

    def make_again(self, damaged: Part) -> Part:
        """The part anew, as it was before rows of it were `damaged`."""

        def whole(part: Part) -> bool:
            return all(np.array_equal(row_checksums(part.columns[name]), sums) for name, sums in checksums.items())

        checksums = damaged.checksums
        part = self.make(whole)
        if not whole(part):
            raise InputError(
                f"data: found rows in {self.path} that were damaged and cannot be made as they were, expected the "
                "samples and the libraries they were made with; remove the file and start a new run"
            )
        _LOG.warning("made again what was damaged in the cache: %s", self.path)
        return replace(part, make_again=partial(self.make_again, damaged))

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
            columns = {name: _to_numpy(table.column(name).chunk(0), shape) for name, shape in self.shapes.items()}
            # Copied: damage that comes later must not matter to what is compared now.
            columns |= {name: values.copy() for name, values in columns.items() if values.ndim == 1}
            checksums = {
                name: _to_numpy(table.column(name + _CHECKSUM).chunk(0), ()).copy()
                for name, values in columns.items()
                if values.ndim > 1
            }
            part = Part(columns, table.column(ERRORS).to_pylist(), checksums)
            return part if table.schema.metadata[_SEAL] == self._seal(part) else None
        except Exception:  # Whatever a damaged file can make pyarrow raise.
            return None

    def _write(self, part: Part) -> None:
        """Write the file so that it is there whole or not at all; the caller holds the lock."""
        import pyarrow as pa

        remove_unfinished(self.path.parent)
        part = replace(
            part, checksums={name: row_checksums(values) for name, values in part.columns.items() if values.ndim > 1}
        )
        columns = part.columns | {name + _CHECKSUM: values for name, values in part.checksums.items()}
        arrays = [*map(_to_arrow, columns.values()), pa.array(part.errors, pa.string())]
        schema = _features(columns).arrow_schema
        batch = pa.record_batch(arrays, schema=schema.with_metadata({**schema.metadata, _SEAL: self._seal(part)}))
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


def _features(columns: dict[str, NDArray]) -> Features:
    from datasets import Features, List, Value

    def of(values: NDArray) -> Value | List:
        value = Value(str(values.dtype))
        return value if values.ndim == 1 else List(value, int(np.prod(values.shape[1:])))

    return Features(**{name: of(values) for name, values in columns.items()}, **{ERRORS: Value("string")})


def _to_arrow(values: NDArray) -> pa.Array:
    import pyarrow as pa

    flat = pa.array(values.reshape(-1))
    return flat if values.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, int(np.prod(values.shape[1:])))


def _to_numpy(array: pa.Array, shape: tuple[int, ...]) -> NDArray:
    flat = array.flatten() if shape else array
    values: NDArray = flat.to_numpy(zero_copy_only=True)
    return values.reshape(-1, *shape)
