"""Texts: classified ones, and ones that a causal language model learns to write."""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from string import Formatter
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import fedra_engine.data.sources.hub as hub
import fedra_engine.data.sources.tables as tables
from fedra_engine.config import DataConfig
from fedra_engine.data import names
from fedra_engine.data.cache import cache_folder, writable_cache
from fedra_engine.data.domain_data import DataTask, DomainData, prepare_source
from fedra_engine.data.names import SampleSource, is_missing, listed
from fedra_engine.runtime.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

_TRAIN = "train"
_AT_ONCE = 1000
_CHARACTERS_AT_ONCE = 2**22
"""Most rows and, but for the last of these, characters that wait in memory to be written."""

_Columns = tuple[str | None, str | None, str | None]
"""Which columns of a table say label, domain and client; None for no column."""
_Template = list[tuple[str, str | None]]
"""Literal texts, each with the column whose value follows it."""


class _Table(NamedTuple):
    """Rows of one file or split, `place`; `domain` is None where that does not say."""

    place: str
    domain: str | None
    rows: Callable[[], Iterator[tables.Row]]


class _Sample(NamedTuple):
    """What is known of a text; `digest` is equal for equal texts, and `client` empty where it is nobody's."""

    digest: int
    label: str | None
    domain: str
    client: str
    source: SampleSource
    is_test: bool


_Splits = dict[str, list[_Table]]
"""What is trained on comes first; then what may become the test set, the first choice first."""


def load_text_classification(config: DataConfig, seed: int) -> DomainData:
    """Texts with a label from files or a data set (docs/data.md).

    Raises:
        InputError: files, columns or lines that cannot be used (the message has file and line).
    """
    if _is_dataset(config):
        data = hub.load_hf_dataset(config, seed)
        if data.task != "text_classification":
            raise InputError("data.columns.input: found images with data.source text_classification, expected texts")
        return data
    reader = _Reader(config, "text_classification", {"text": [("", config.columns.input or "text")]})
    return _load_files(reader, config, seed)


def load_causal_lm(config: DataConfig, seed: int) -> DomainData:
    """Texts, or prompts with the responses to learn, from files or a data set (docs/data.md).

    Raises:
        InputError: files, columns or lines that cannot be used (the message has file and line).
    """
    if _is_dataset(config):
        return causal_lm_samples(*hub.open_dataset(config), config, seed)
    return _load_files(_causal_lm_reader(config), config, seed)


def causal_lm_samples(
    train: Dataset, held_out: dict[str, Dataset], config: DataConfig, seed: int, given_as: str = "data.root"
) -> DomainData:
    """Those of `load_causal_lm`, of splits as `open_dataset` returns them; `given_as` names these in messages.

    Raises:
        InputError: columns or rows that cannot be used.
    """

    def table(name: str, data: Dataset) -> _Table:
        rows = lambda: ((SampleSource(f"{name}, row", row), values) for row, values in enumerate(data))  # noqa: E731
        return _Table(name, None, rows)

    reader = _causal_lm_reader(config, given_as)
    return reader.read({name: [table(name, data)] for name, data in {_TRAIN: train, **held_out}.items()}, seed)


def _causal_lm_reader(config: DataConfig, given_as: str = "data.root") -> _Reader:
    prompt: _Template = [] if config.prompt is None else _parse(config.prompt)
    response = config.columns.input or "text" if config.prompt is None else config.columns.response or "response"
    return _Reader(config, "causal_lm", {"prompt": prompt, "response": [("", response)]}, given_as)


def _load_files(reader: _Reader, config: DataConfig, seed: int) -> DomainData:
    splits, root = _file_splits(config), Path(str(config.root))
    files = [Path(table.place) for split in splits.values() for table in split]
    tables.check_encoding(config.encoding, files)
    if root.is_dir():
        left_out = {file for entry in tables.visible_entries(root) for file in tables.files_below(entry)} - set(files)
        reader.notes += tables.left_out_notes(
            root, left_out, f"{' '.join(tables.SUFFIXES)} files, laid out as docs/data.md says"
        )
    try:
        return reader.read(splits, seed)
    except UnicodeError as error:
        raise InputError(
            f"data.encoding: found no {config.encoding} text in {tables.undecodable(files, config.encoding)}; expected "
            "the encoding of all files"
        ) from error


@dataclass
class _Reader:
    """Makes samples of rows.

    Attributes:
        config: of the source.
        task: what the samples are for.
        templates: of every text of a sample, the one that must not be missing last.
        given_as: the option or argument that named the rows, for messages.
        samples: what was read.
        notes: lines for the log on what was passed over.
    """

    config: DataConfig
    task: DataTask
    templates: dict[str, _Template]
    given_as: str = "data.root"
    samples: list[_Sample] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def read(self, splits: _Splits, seed: int) -> DomainData:
        """The samples of the training split, and of the first that can be the test set."""
        content = store_texts(list(self.templates), self._texts(splits))
        digests, labels, domain_names, clients, sources, is_test = zip(*self.samples, strict=True)
        encoded, classes = None, list[str]()
        if None not in labels:
            encoded, classes = names.encode_names(labels)
        elif any(label is not None for label in labels):
            raise InputError(
                f"data.columns.label: {sources[labels.index(None)]}: found no label, expected one in every row or in "
                "none"
            )
        domain_of, domains = names.encode_names(domain_names)
        data = DomainData(
            task=self.task,
            content=content,
            domain_of=domain_of,
            domains=domains,
            labels=encoded,
            classes=classes,
            is_test=np.array(is_test),
            clients=np.array(clients) if any(clients) else None,
            sample_sources=names.sample_sources(sources),
            notes=[*self.notes, *_repeated(np.array(digests), np.array(is_test))],
            given_as=self.given_as,
        )
        return prepare_source(data, self.config, seed, split=not any(is_test))

    def _texts(self, splits: _Splits) -> Iterator[list[str]]:
        train, *held_out = splits
        yield from self._of_split(splits[train], is_test=False)
        test = next(iter(held_out), None)
        if self.task == "text_classification":
            column = self.config.columns.label or "label"
            labels = ((name, _labels(splits[name], column)) for name in held_out)
            test, self.notes[:0] = names.labelled_split(labels, lambda: [sample.label for sample in self.samples])
        if test is not None:
            yield from self._of_split(splits[test], is_test=True)

    def _of_split(self, split: list[_Table], *, is_test: bool) -> Iterator[list[str]]:
        for table in split:
            before = len(self.samples)
            yield from self._of_table(table, is_test)
            if len(self.samples) == before:
                raise InputError(f"{self.given_as}: found no samples in {table.place!r}, expected some")

    def _of_table(self, table: _Table, is_test: bool) -> Iterator[list[str]]:
        """The texts of every row that has one; adds what else is known to `samples`."""
        present: list[str] | None = None
        columns: _Columns | None = None
        for source, row in table.rows():
            if columns is None or list(row) != present:
                # Lines of a jsonl file may differ.
                before, present = columns, list(row)
                columns = self._columns(present, source)
                if before is not None and columns[1] != before[1]:
                    found = "no" if columns[1] is None else "a"
                    raise InputError(
                        f"data.columns.domain: {source}: found {found} domain, other than in the lines before; "
                        "expected one in every line or in none"
                    )
            texts = [self._fill(template, row, source) for template in self.templates.values()]
            if is_missing(texts[-1]):
                if self.config.unreadable == "error":
                    column = list(self.templates.values())[-1][-1][1]
                    raise InputError(
                        f"{self.given_as}: {source}: found no text in column {column!r}, expected some, or "
                        "data.unreadable skip"
                    )
                self.notes.append(f"{source}: skipped, it has no text")
                continue
            label, domain, client = columns
            unlabelled = label is None or (self.task == "causal_lm" and is_missing(row[label]))
            self.samples.append(
                _Sample(
                    hash(tuple(texts)),
                    None if unlabelled or label is None else names.class_name(row[label], label, source),
                    table.domain or hub.ONE_DOMAIN
                    if domain is None
                    else names.name_of(row[domain], "domain", domain, source),
                    "" if client is None else names.client_name(row[client], client, source),
                    source,
                    is_test,
                )
            )
            yield texts

    def _columns(self, present: list[str], source: SampleSource) -> _Columns:
        """The columns to use of those that are `present`.

        Raises:
            InputError: one is missing.
        """
        for role, template in self.templates.items():
            for _, column in template:
                if column is not None and column not in present:
                    name = {"prompt": "data.prompt", "text": "data.columns.input"}.get(role, f"data.columns.{role}")
                    raise InputError(f"{name}: {source}: found no column {column!r}, expected one of {listed(present)}")
        wanted = self.config.columns
        label = hub.optional_column(wanted.label, "label", present)
        if self.task == "text_classification" and label is None:
            raise InputError(
                f"data.columns.label: {source}: found no column 'label', expected one of {listed(present)}"
            )
        domain, client = (hub.optional_column(getattr(wanted, role), role, present) for role in ("domain", "client"))
        return label, domain, client

    def _fill(self, template: _Template, row: Mapping[str, Any], source: SampleSource) -> str:
        pieces = []
        for literal, column in template:
            value = "" if column is None or is_missing(row[column]) else row[column]
            if not isinstance(value, str | int | float) or isinstance(value, bool) or value in (math.inf, -math.inf):
                found = value if isinstance(value, float) else f"a {type(value).__name__}"
                raise InputError(f"{self.given_as}: {source}: found {found} in column {column!r}, expected a text")
            pieces.append(literal + str(value))
        return "".join(pieces)


def store_texts(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Dataset:
    """A data set of texts, written to disk as they are read and memory-mapped from then on.

    Its file has no name in the folder of the cache, so nothing is left of it however the process ends.

    Args:
        columns: names.
        rows: texts of every column.

    Raises:
        InputError: the cache folder cannot be written, or the disk is full.
    """
    import pyarrow as pa
    from datasets import Dataset, Features, Value
    from datasets.table import InMemoryTable

    def write(waiting: list[Sequence[str]]) -> None:
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
        if len(waiting) == _AT_ONCE or characters >= _CHARACTERS_AT_ONCE:
            write(waiting)
            waiting, characters = [], 0
    write(waiting)
    with writable_cache(f"into {cache_folder()}"):
        writer.close()
        file.flush()
        # The mapping outlives the file.
        with file, pa.memory_map(f"/dev/fd/{file.fileno()}") as mapped:
            table = pa.ipc.open_stream(mapped).read_all()
    # Without a fingerprint the library would make one of all rows.
    return Dataset(InMemoryTable(table), fingerprint=uuid.uuid4().hex)


def _labels(split: list[_Table], column: str) -> Iterator[object] | None:
    """The labels of a split; None if it has no such column."""
    rows = (row for table in split for _, row in table.rows())
    first = next(rows, {})
    return (row.get(column) for row in chain([first], rows)) if column in first else None


def _parse(prompt: str) -> _Template:
    try:
        pieces = list(Formatter().parse(prompt))
    except ValueError as error:
        raise InputError(f"data.prompt: {error}; expected column names in braces, such as {{instruction}}") from error
    for _, column, form, conversion in pieces:
        if form or conversion:
            raise InputError(
                f"data.prompt: found a format of column {column!r}, expected column names alone in braces, such as "
                "{instruction}"
            )
    return [(literal, column) for literal, column, _, _ in pieces]


def _repeated(digests: NDArray[np.int64], is_test: NDArray[np.bool_]) -> list[str]:
    """A note on equal texts: those that were trained on measure nothing in a test set."""
    if is_test.any():
        repeated = int(np.isin(digests[is_test], digests[~is_test]).sum())
        where = "of the test set are in the training set, too"
    else:
        repeated = len(digests) - len(np.unique(digests))
        where = "repeat another, so the test set that is drawn may have texts of the training set"
    return [f"texts: {repeated} {where}"] if repeated else []


def _is_dataset(config: DataConfig) -> bool:
    """Whether `config.root` is no file or folder of files."""
    assert config.root is not None
    root = Path(config.root)
    return not root.is_file() and (not root.is_dir() or hub.is_saved_dataset(root))


def _file_splits(config: DataConfig) -> _Splits:
    """The files of `config.root`, or those in this folder."""
    assert config.root is not None
    if config.subset is not None:
        raise InputError(f"data.subset: found {config.subset!r} with files, {config.root!r}; expected null")

    def table(file: Path, domain: str | None = None) -> _Table:
        return _Table(str(file), domain, lambda: tables.read_table(file, config.encoding))

    root = Path(config.root)
    if root.is_file():
        return {_TRAIN: [table(root)]}
    folders = {entry.name: entry for entry in tables.visible_entries(root) if entry.is_dir()}
    if held_out := _held_out(folders):
        # Beside a test set, the others may hold anything.
        used = [name for name in held_out if name == held_out[0] or tables.has_tables(folders[name])]
        found = {name: tables.table_files(folders[name]) for name in (_TRAIN, *used)}
        return {name: [table(file, file.stem) for file in files] for name, files in found.items()}
    files = {file.stem: file for file in tables.table_files(root)}
    held_out = _held_out(files)
    if not held_out:
        return {_TRAIN: [table(file, domain) for domain, file in files.items()]}
    if others := files.keys() - {_TRAIN, *hub.HELD_OUT}:
        raise InputError(
            f"data.root: found {files[min(others)].name!r} beside {files[held_out[0]].name!r} in {str(root)!r}, "
            "expected files of the splits alone, or one file per domain"
        )
    return {name: [table(files[name])] for name in (_TRAIN, *held_out)}


def _held_out(present: Collection[str]) -> list[str]:
    """Which of `present` may be the test set, the first choice first, if one of them is the training set."""
    return [name for name in hub.HELD_OUT if _TRAIN in present and name in present]
