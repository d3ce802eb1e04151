"""Listing folders of samples, and reading csv, tsv, jsonl, parquet and txt files row by row."""

from __future__ import annotations

import codecs
import csv
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from fedra_engine.config import DataConfig
from fedra_engine.data.domain_data import SampleSource
from fedra_engine.runtime.errors import InputError, first_few
from fedra_engine.runtime.files import check_regular

if TYPE_CHECKING:
    from pyarrow import RecordBatch

TRAIN = "train"
HELD_OUT = ("test", "validation", "valid", "val", "dev")
"""Names of splits other than the training split; the first one with labelled samples becomes the test set."""
ONE_DOMAIN = "all"
"""Name of the domain if there are no others."""
_AT_ONCE = 1000
"""Rows of a parquet file in memory."""
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""Encodings by byte order mark; a mark comes before any prefix of it."""
_SHOWN = 3
"""Maximum number of files that a message names."""
_TRIED = 20
"""Maximum number of folders that are tried for a message."""
_SYSTEM_FILES = frozenset({"thumbs.db", "desktop.ini"})
"""Files that Windows leaves in folders."""

Row = tuple[SampleSource, Mapping[str, Any]]
"""The source of a row, and its values by column."""


class Table(NamedTuple):
    """Rows of one file, or of one split of a data set.

    Attributes:
        place: the file or split, for messages.
        rows: reads the rows.
        domain: default for rows without a domain.
        columns: of all rows; None if rows may differ.
    """

    place: str
    rows: Callable[[], Iterator[Row]]
    domain: str = ONE_DOMAIN
    columns: list[str] | None = None


Splits = dict[str, list[Table]]
"""Tables by split: the training split, then candidates for the test set in order of preference."""


class _BadLineError(ValueError):
    """The number of a line, and what is wrong with it."""


def visible_entries(folder: Path) -> list[Path]:
    """The sorted entries of `folder`, without hidden files and files of the operating system.

    Raises:
        InputError: the folder cannot be listed, or a path is not UTF-8 text, which data sets cannot store.
    """
    try:
        entries = sorted(entry for entry in folder.iterdir() if not _is_hidden(entry.name))
    except OSError as error:
        raise InputError(f"data.root: cannot list {folder}: {error.strerror}; expected a readable folder") from error
    for entry in entries:
        try:
            str(entry).encode()
        except UnicodeEncodeError as error:
            raise InputError(f"data.root: found {str(entry)!r}, expected a name that is UTF-8 text") from error
    return entries


def nearby_root_hint(root: Path, fits: Callable[[Path], bool]) -> str:
    """The end of a message about a `root` that may be a level too deep or not deep enough: the folder that `fits`.

    That is the first of those in `root`, its parent and the parent's; empty if none fits.
    """
    root = Path(os.path.abspath(root))
    inside = []
    with suppress(InputError):
        inside = [entry for entry in visible_entries(root) if os.path.isdir(entry)] if os.path.isdir(root) else []
    for folder in (*inside[:_TRIED], root.parent, root.parent.parent):
        with suppress(InputError):
            if fits(folder):
                return f" (did you mean {str(folder)!r}?)"
    return ""


def chosen_domains(config: DataConfig, present: Sequence[str], folder: Path) -> Sequence[str]:
    """The configured domains, or all `present` in `folder`; InputError if one is not present."""
    # Checked before any path is made of them: a name such as `../x` would lead out of the folder.
    for domain in config.domains:
        if domain not in present:
            raise InputError(f"data.domains: found {domain!r}, expected some of those in {folder}: {sorted(present)}")
    return config.domains or present


def left_out_notes(root: Path, entries: Iterable[Path], expected: str) -> list[str]:
    """One or no log line about `entries`, the files and folders below `root` that no sample is made from."""
    files = sorted(file for entry in entries for file in _files_below(entry))
    if not files:
        return []
    kinds = Counter(file.suffix.lower() or "without suffix" for file in files)
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    names = first_few([str(file.relative_to(root)) for file in files], _SHOWN)
    return [f"warning: {root}: left out {counts}: {names}; expected {expected}"]


def _files_below(entry: Path) -> list[Path]:
    """The file `entry`, or all visible files below the folder `entry`."""
    # A link to a folder may lead back.
    if not os.path.isdir(entry) or os.path.islink(entry):
        return [entry]
    found = []
    for above, folders, files in os.walk(entry):
        folders[:] = sorted(name for name in folders if not _is_hidden(name))
        found += [Path(above, name) for name in sorted(files) if not _is_hidden(name)]
    return found


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _SYSTEM_FILES


def table_splits(config: DataConfig) -> tuple[Splits, list[Path], list[str]]:
    """The tables in the file or folder `config.root`, all their files, and notes on other files.

    Raises:
        InputError: there are no files, or their layout is not that of docs/data.md.
    """
    if config.subset is not None:
        raise InputError(f"data.subset: found {config.subset!r} with files, {config.root!r}; expected null")
    root = Path(str(config.root))
    splits = {TRAIN: {ONE_DOMAIN: root}} if root.is_file() else _split_files(root)
    files = [file for split in splits.values() for file in split.values()]
    check_encoding(config.encoding, files)
    notes = []
    if root.is_dir():
        left_out = {file for entry in visible_entries(root) for file in _files_below(entry)} - set(files)
        notes = left_out_notes(root, left_out, f"{' '.join(SUFFIXES)} files, laid out as docs/data.md says")
    tables = {
        name: [Table(str(file), partial(read_table, file, config.encoding), domain) for domain, file in split.items()]
        for name, split in splits.items()
    }
    return tables, files, notes


def _split_files(root: Path) -> dict[str, dict[str, Path]]:
    """The files in the folder `root`, by split and domain."""
    folders = {entry.name: entry for entry in visible_entries(root) if entry.is_dir()}
    if held_out := _held_out(folders):
        # The other splits are not needed, so they may hold anything.
        used = [name for name in held_out if name == held_out[0] or any(map(_is_table, visible_entries(folders[name])))]
        return {name: _table_files(folders[name]) for name in (TRAIN, *used)}
    files = _table_files(root)
    held_out = _held_out(files)
    if not held_out:
        return {TRAIN: files}
    if others := files.keys() - {TRAIN, *HELD_OUT}:
        raise InputError(
            f"data.root: found {files[min(others)].name!r} beside {files[held_out[0]].name!r} in {str(root)!r}, "
            "expected files of the splits alone, or one file per domain"
        )
    return {name: {ONE_DOMAIN: files[name]} for name in (TRAIN, *held_out)}


def _held_out(present: Collection[str]) -> list[str]:
    """The candidates for the test set in `present`, in order of preference; none without a training split."""
    return [name for name in HELD_OUT if TRAIN in present and name in present]


def _table_files(folder: Path) -> dict[str, Path]:
    """The tables in `folder`, by file name without suffix."""
    files = list(filter(_is_table, visible_entries(folder)))
    if not files:
        near = nearby_root_hint(folder, lambda other: any(map(_is_table, visible_entries(other))))
        raise InputError(
            f"data.root: found no {' '.join(SUFFIXES)} files in {str(folder)!r}, expected one per domain{near}"
        )
    by_stem = {file.stem: file for file in files}
    for file in files:
        if by_stem[file.stem] is not file:
            raise InputError(f"data.root: found several files {file.with_suffix('.*')}, expected one per domain")
    return by_stem


def _is_table(file: Path) -> bool:
    return file.suffix.lower() in SUFFIXES


def check_encoding(encoding: str, files: Iterable[Path] = ()) -> None:
    """Raise InputError if `encoding` is unknown, or is not the default although `files` has no text file."""
    try:
        is_known = "a".encode(encoding).decode(encoding) == "a"
    except (LookupError, ValueError):
        is_known = False
    if not is_known:
        raise InputError(f"data.encoding: found {encoding!r}, expected the name of an encoding, such as cp1252")
    if encoding != DataConfig.encoding and not any(file.suffix.lower() in TEXT_READERS for file in files):
        raise InputError(
            f"data.encoding: found {encoding} for data without {', '.join(TEXT_READERS)} files, expected utf-8"
        )


def read_table(file: Path, encoding: str) -> Iterator[Row]:
    """Read the rows of `file` in the format of its suffix; lines of a txt file are the column `text`.

    A byte order mark overrides `encoding`, and parquet files ignore it.

    Raises:
        InputError: the suffix is not in `SUFFIXES`, the file cannot be opened, or a line cannot be read.
        UnicodeError: the text is in another encoding; `undecodable` finds the line.
    """
    if not _is_table(file):
        raise InputError(f"data.root: found {str(file)!r}, expected a file that ends in one of {' '.join(SUFFIXES)}")
    try:
        read = TEXT_READERS.get(file.suffix.lower())
        if read is None:
            yield from _read_parquet(file)
            return
        place = f"{file}, line"
        for number, row in read(text_lines(file, encoding)):
            yield SampleSource(place, number), row
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"data.root: cannot read {file}: {reason}; expected a {file.suffix} file") from error
    except _BadLineError as error:
        number, wrong = error.args
        raise InputError(f"data.root: {file}, line {number}: {wrong}") from error


def _read_separated(
    lines: Iterator[str], *, delimiter: str, quoting: Literal[0, 3]
) -> Iterator[tuple[int, dict[str, str]]]:
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=True)
    names, header = None, 1
    while True:
        # Not `line_num` after reading: a quoted value may span several lines.
        line = reader.line_num + 1
        try:
            values = next(reader, None)
        except csv.Error as error:
            raise _BadLineError(line, f"{error}; expected separated values") from error
        if values is None:
            return
        if not values:
            # A blank line, perhaps above the header.
            continue
        if names is None:
            names, header = values, line
            for name in names:
                if names.count(name) > 1:
                    raise _BadLineError(line, f"found several columns {name!r}, expected one")
        elif len(values) != len(names):
            raise _BadLineError(line, f"found {len(values)} values, expected {len(names)} as in line {header}")
        else:
            yield line, dict(zip(names, values, strict=True))


def _read_jsonl(lines: Iterator[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            # Half of a surrogate pair, which cannot be encoded.
            if "\\ud" in line.lower():
                json.dumps(row, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:
            raise _BadLineError(number, f"{error}; expected a JSON object") from error
        if not isinstance(row, dict):
            raise _BadLineError(number, f"found {line.strip()[:40]!r}, expected a JSON object")
        yield number, row


def _read_txt(lines: Iterator[str]) -> Iterator[tuple[int, dict[str, str]]]:
    return ((number, {"text": line.strip()}) for number, line in enumerate(lines, start=1) if line.strip())


def _read_parquet(file: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    place, number = f"{file}, row", 1
    check_regular(file)
    try:
        for batch in pq.ParquetFile(file).iter_batches(batch_size=_AT_ONCE):
            for row in _python_rows(batch):
                yield SampleSource(place, number), row
                number += 1
    except pa.ArrowException as error:
        raise InputError(f"data.root: cannot read {file}: {error}; expected a parquet file") from error
    except (ValueError, OverflowError) as error:
        raise InputError(
            f"data.root: {file}, row {number}: {error}; expected UTF-8 texts and dates of a calendar"
        ) from error


def _python_rows(batch: RecordBatch) -> Iterable[dict[str, Any]]:
    try:
        rows: list[dict[str, Any]] = batch.to_pylist()
        return rows
    except (ValueError, OverflowError):
        # Text that is not UTF-8 or a time outside Python's calendar; row by row, to find it.
        return (batch.slice(at, 1).to_pylist()[0] for at in range(len(batch)))


def text_lines(file: Path, encoding: str) -> Iterator[str]:
    """The lines of a text file, with line ends; see `read_table` for `encoding` and errors."""
    check_regular(file)
    with file.open("rb") as opened:
        start = opened.read(4)
    marked = next((marked for mark, marked in _MARKS.items() if start.startswith(mark)), encoding)
    with file.open(encoding=marked, newline="\n") as opened:
        for number, line in enumerate(opened, start=1):
            if "\0" in line:
                # A sign of UTF-16 without a byte order mark.
                raise InputError(f"data.root: {file}, line {number}: found a NUL character, expected {encoding} text")
            yield line


def undecodable(files: Iterable[Path], encoding: str) -> str:
    """The first few of `files` that are not text in `encoding`, with line numbers, and the number of others."""
    wrong = [(file, line) for file in files if (line := _undecodable_line(file, encoding)) is not None]
    return first_few([f"{file} (line {line})" for file, line in wrong], _SHOWN)


def _undecodable_line(file: Path, encoding: str) -> int | None:
    """Number of the first line that cannot be decoded; None if there is none, or `file` cannot be read as text."""
    if file.suffix.lower() not in TEXT_READERS:
        return None
    line = 1
    try:
        for _ in text_lines(file, encoding):
            line += 1
    except UnicodeDecodeError as error:
        # Many lines are decoded at a time.
        return line + error.object[: error.start].decode(error.encoding, "ignore").count("\n")
    except UnicodeError:
        return line
    except (OSError, InputError):
        return None
    return None


TEXT_READERS: dict[str, Callable[[Iterator[str]], Iterator[tuple[int, dict[str, Any]]]]] = {
    ".csv": partial(_read_separated, delimiter=",", quoting=csv.QUOTE_MINIMAL),
    # Quotation marks are ordinary characters in tab-separated files.
    ".tsv": partial(_read_separated, delimiter="\t", quoting=csv.QUOTE_NONE),
    ".jsonl": _read_jsonl,
    ".txt": _read_txt,
}
"""Parsers by suffix, from lines to (line number, values by column)."""
SUFFIXES = (*TEXT_READERS, ".parquet")
