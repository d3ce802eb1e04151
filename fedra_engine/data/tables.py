"""Read csv, tsv, jsonl, parquet and txt files row by row; errors name file and line."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fedra_engine.data.origins import Origin
from fedra_engine.errors import InputError

if TYPE_CHECKING:
    from pyarrow import RecordBatch

_AT_ONCE = 1000
"""Rows of a parquet file that are in memory."""

Row = tuple[Origin, Mapping[str, Any]]
"""Where a row is, and its values by column."""


def read_table(file: Path) -> Iterator[Row]:
    """The rows of `file`, by its suffix; lines of a txt file are the column `text`.

    Raises:
        InputError: the file cannot be opened or has a line that cannot be read.
    """
    try:
        yield from READERS[file.suffix.lower()](file)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"data.root: cannot read {file}: {reason}; expected a {file.suffix} file") from error


def _read_csv(file: Path) -> Iterator[Row]:
    yield from _read_separated(file, delimiter=",", quoting=csv.QUOTE_MINIMAL)


def _read_tsv(file: Path) -> Iterator[Row]:
    # In tab-separated texts a quotation mark is a quotation mark.
    yield from _read_separated(file, delimiter="\t", quoting=csv.QUOTE_NONE)


def _read_separated(file: Path, *, delimiter: str, quoting: Literal[0, 3]) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(_lines(file), delimiter=delimiter, quoting=quoting, strict=True)
    names, header = None, 1
    while True:
        # Not `line_num` itself: a quoted value may go over several lines.
        line = reader.line_num + 1
        try:
            values = next(reader, None)
        except csv.Error as error:
            raise InputError(f"data.root: {file}, line {line}: {error}; expected separated values") from error
        if values is None:
            return
        if not values:
            # A blank line; some stand above the names.
            continue
        if names is None:
            names, header = values, line
            for name in names:
                if names.count(name) > 1:
                    raise InputError(f"data.root: {file}, line {line}: found several columns {name!r}, expected one")
        elif len(values) != len(names):
            raise InputError(
                f"data.root: {file}, line {line}: found {len(values)} values, expected {len(names)} as in line {header}"
            )
        else:
            yield Origin(f"{file}, line", line), dict(zip(names, values, strict=True))


def _read_jsonl(file: Path) -> Iterator[Row]:
    for number, line in enumerate(_lines(file), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            # Half of a character, which no other encoding knows.
            if "\\ud" in line.lower():
                json.dumps(row, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:
            raise InputError(f"data.root: {file}, line {number}: {error}; expected a JSON object") from error
        if not isinstance(row, dict):
            raise InputError(f"data.root: {file}, line {number}: found {line.strip()[:40]}, expected a JSON object")
        yield Origin(f"{file}, line", number), row


def _read_parquet(file: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    place, start = f"{file}, row", 1
    try:
        for batch in pq.ParquetFile(file).iter_batches(batch_size=_AT_ONCE):
            for number, row in enumerate(_python_rows(batch, Origin(place, start)), start=start):
                yield Origin(place, number), row
            start += len(batch)
    except pa.ArrowException as error:
        raise InputError(f"data.root: cannot read {file}: {error}; expected a parquet file") from error


def _python_rows(batch: RecordBatch, first: Origin) -> Iterator[dict[str, Any]]:
    try:
        yield from batch.to_pylist()
    except (ValueError, OverflowError):
        # What Python cannot express: text that is no UTF-8, times outside its calendar. Row by row, to find it.
        for at in range(len(batch)):
            try:
                yield from batch.slice(at, 1).to_pylist()
            except (ValueError, OverflowError) as error:
                origin = first._replace(number=first.number + at)
                raise InputError(
                    f"data.root: {origin}: {error}; expected UTF-8 texts and dates of a calendar"
                ) from error


def _read_txt(file: Path) -> Iterator[Row]:
    for number, line in enumerate(_lines(file), start=1):
        if line.strip():
            yield Origin(f"{file}, line", number), {"text": line.strip()}


def _lines(file: Path) -> Iterator[str]:
    """The lines of a UTF-8 file, with their ends; a byte order mark is dropped."""
    with file.open("rb") as opened:
        for number, line in enumerate(opened, start=1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise InputError(f"data.root: {file}, line {number}: {error.reason}; expected UTF-8 text") from error


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
}
"""Reader of every kind of file, by suffix."""
