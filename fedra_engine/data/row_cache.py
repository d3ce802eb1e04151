"""A cache on disk of preprocessed rows, one memory-mapped Arrow file per part.

A part is named after what it was made of, so a part that is there is right, and a part is there whole or not at all.
What an interrupted run has made, the next one finds. Processes that need the same parts at the same time take turns.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedra_engine.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Features

ERRORS = "error"
"""The column with what is wrong with a row; empty where nothing is."""
_SUFFIX = ".arrow"
_UNFINISHED = ".tmp"


@dataclass(frozen=True)
class Part:
    """Preprocessed rows.

    Attributes:
        columns: [rows, …] each, by name.
        errors: [rows], what is wrong with a row; empty where nothing is.
    """

    columns: dict[str, NDArray]
    errors: list[str]


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
    folder = cache_folder()
    parts = []
    for index, key in enumerate(keys):
        file = folder / f"{key}{_SUFFIX}"
        part = _read(file, shapes)
        if part is None:
            part = _make_part(file, index, make, shapes, check)
        else:
            check(index, part)
        parts.append(part)
        made(index)
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


def _make_part(
    file: Path,
    index: int,
    make: Callable[[int], Part],
    shapes: dict[str, tuple[int, ...]],
    check: Callable[[int, Part], None],
) -> Part:
    from filelock import FileLock

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file.parent / "lock"):
            # Somebody else may have made it while this process waited.
            part = _read(file, shapes)
            if part is None:
                part = make(index)
                check(index, part)
                _write(file, part)
                part = _read(file, shapes)
    except OSError as error:
        raise InputError(
            f"data: cannot write {file}: {error.strerror or error}; expected room in a writable cache folder "
            "(HF_DATASETS_CACHE names it)"
        ) from error
    assert part is not None
    return part


def _write(file: Path, part: Part) -> None:
    """Write `file` so that it is there whole or not at all; the caller holds the lock."""
    import pyarrow as pa

    for left_over in file.parent.glob(f"*{_UNFINISHED}"):
        left_over.unlink()
    unfinished = file.with_suffix(_UNFINISHED)
    features = _features(part)
    arrays = {name: _to_arrow(values) for name, values in part.columns.items()}
    arrays[ERRORS] = pa.array(part.errors, pa.string())
    batch = pa.record_batch(list(arrays.values()), schema=features.arrow_schema)
    try:
        with pa.OSFile(str(unfinished), "wb") as sink, pa.ipc.new_stream(sink, batch.schema) as writer:
            writer.write_batch(batch)
        descriptor = os.open(unfinished, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
        os.replace(unfinished, file)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def _read(file: Path, shapes: dict[str, tuple[int, ...]]) -> Part | None:
    """The part in `file`, its columns memory-mapped; None when there is none or a damaged one."""
    import pyarrow as pa

    if not file.exists():
        return None
    try:
        # The mapping outlives the open file, of which there may not be too many.
        with pa.memory_map(str(file)) as source:
            table = pa.ipc.open_stream(source).read_all()
        # Reads no pixels or tokens, which may be anything.
        table.validate(full=True)
        columns = {name: _to_numpy(table.column(name).chunk(0), shape) for name, shape in shapes.items()}
        return Part(columns, table.column(ERRORS).to_pylist())
    except Exception:  # Whatever a damaged file can make pyarrow raise.
        return None


def _features(part: Part) -> Features:
    from datasets import Features, List, Value

    def of(values: NDArray) -> Value | List:
        value = Value(str(values.dtype))
        return value if values.ndim == 1 else List(value, int(np.prod(values.shape[1:])))

    kinds = {name: of(values) for name, values in part.columns.items()}
    return Features(**kinds, **{ERRORS: Value("string")})


def _to_arrow(values: NDArray) -> pa.Array:
    import pyarrow as pa

    flat = pa.array(values.reshape(-1))
    return flat if values.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, int(np.prod(values.shape[1:])))


def _to_numpy(array: pa.Array, shape: tuple[int, ...]) -> NDArray:
    flat = array.flatten() if shape else array
    values: NDArray = flat.to_numpy(zero_copy_only=True)
    return values.reshape(-1, *shape)
