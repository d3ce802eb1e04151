"""Samples of files and data sets: images and texts with labels, and texts that a model learns to write."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedra_engine.config import DataConfig
from fedra_engine.data.cache import store_texts
from fedra_engine.data.domain_data import (
    DataTask,
    DomainData,
    SampleSource,
    encode_names,
    is_missing,
    listed,
    name_of,
    prepare_source,
    sample_sources,
)
from fedra_engine.data.sources.files import TRAIN, Row, Splits, Table, table_splits, undecodable
from fedra_engine.data.sources.hub import is_saved_dataset, joined, open_dataset, state_of
from fedra_engine.runtime.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

_AT_ONCE = 32
"""Rows of a data set that are in memory."""
_ROLES = ("label", "domain", "client")

_Templates = dict[str, list[tuple[str, str | None]]]
"""Of every text of a sample, the one that must not be missing last: literal texts, and the column that follows each."""
_Columns = dict[str, str | None]
"""The column of each of `_ROLES`; None for no column."""


class _Sample(NamedTuple):
    """What is known of a sample; `digest` is equal for equal texts, and `client` empty where it is nobody's."""

    digest: int
    label: str | None
    domain: str
    client: str
    source: SampleSource
    is_test: bool


def load_tables(config: DataConfig, seed: int) -> DomainData:
    """The samples of the data set `config.root`, or of its files where `config.source` is not `hf_dataset`.

    Raises:
        InputError: files, columns or lines that cannot be used (the message has file and line).
    """
    root = Path(str(config.root))
    if config.source == "hf_dataset" or not (root.is_file() or (root.is_dir() and not is_saved_dataset(root))):
        data = dataset_samples(open_dataset(config), config, seed)
        if config.source == "text_classification" and data.task != config.source:
            raise InputError("data.columns.input: found images with data.source text_classification, expected texts")
        return data
    splits, files, notes = table_splits(config)
    task: DataTask = "causal_lm" if config.source == "causal_lm" else "text_classification"
    try:
        if task == "text_classification":
            splits, hidden = _labelled_splits(splits, config.columns.label or "label")
            notes = hidden + notes
        return _Reader(config, task, _templates(config), notes=notes).read(splits, seed)
    except UnicodeError as error:
        raise InputError(
            f"data.encoding: found no {config.encoding} text in {undecodable(files, config.encoding)}; expected "
            "the encoding of all files"
        ) from error


def dataset_samples(
    splits: dict[str, Dataset], config: DataConfig, seed: int, given_as: str = "data.root"
) -> DomainData:
    """Texts to learn where `config.source` is `causal_lm`; else labelled images or texts, by the type of their column.

    Without a held-out split (of labelled samples, one that has labels), a stratified test set is drawn. Without a
    domain column there is one domain.

    Args:
        splits: as `splits_of` returns them.
        config: of the source.
        seed: draws the test set.
        given_as: names the data set in messages.

    Raises:
        InputError: no such column, a column of another type than is needed, or rows that cannot be used.
    """
    if config.source == "causal_lm":
        templates = _templates(config)
        used = [column for template in templates.values() for _, column in template if column is not None]
        used += [getattr(config.columns, role) or role for role in _ROLES]
        tables = {name: [_dataset_table(name, data, used)] for name, data in splits.items()}
        return _Reader(config, "causal_lm", templates, given_as).read(tables, seed)
    train = splits[TRAIN]
    content = config.columns.input or next((name for name in ("image", "text") if name in train.column_names), "image")
    _require_column("data.columns.input", content, train.column_names)
    task = _task(train, content)
    reader = _Reader(config, task, {}, given_as)
    columns = reader.columns(train.column_names)
    known = {role: getattr(train.features.get(columns[role]), "names", None) for role in ("label", "domain")}
    reader.named = {role: names for role, names in known.items() if names is not None}
    used = [name for name in columns.values() if name is not None]
    tables = {name: [_dataset_table(name, data, used)] for name, data in splits.items()}
    tables, reader.notes = _labelled_splits(tables, str(columns["label"]), numbered="label" in reader.named)
    test = next((splits[name] for name in tables if name != TRAIN), None)
    # One column may have several roles.
    data = joined(train, test, list(dict.fromkeys([content, *used])), given_as).select_columns(content)
    # Not of `data`: its other columns do not matter to what is made of its content.
    fingerprint = repr((content, state_of(train), None if test is None else state_of(test)))
    column = "image" if task == "image_classification" else "text"
    return reader.read(tables, seed, data.rename_columns({content: column}), fingerprint)


def _templates(config: DataConfig) -> _Templates:
    plain = [("", config.columns.input or "text")]
    if config.source != "causal_lm":
        return {"text": plain}
    if config.prompt is None:
        return {"prompt": [], "response": plain}
    try:
        pieces = list(Formatter().parse(config.prompt))
    except ValueError as error:
        raise InputError(f"data.prompt: {error}; expected column names in braces, such as {{instruction}}") from error
    for _, column, form, conversion in pieces:
        if form or conversion:
            raise InputError(
                f"data.prompt: found a format of column {column!r}, expected column names alone in braces, such as "
                "{instruction}"
            )
    prompt = [(literal, column) for literal, column, _, _ in pieces]
    return {"prompt": prompt, "response": [("", config.columns.response or "response")]}


@dataclass
class _Reader:
    """Makes samples of rows.

    Attributes:
        config: of the source.
        task: what the samples are for.
        templates: of the texts; none where the content is a column of a data set.
        given_as: the option or argument that named the rows, for messages.
        named: by role, the names that stand for the numbers in its column.
        notes: lines for the log on what was passed over.
        samples: what was read.
    """

    config: DataConfig
    task: DataTask
    templates: _Templates
    given_as: str = "data.root"
    named: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    samples: list[_Sample] = field(default_factory=list)

    def read(
        self, splits: Splits, seed: int, content: Dataset | None = None, fingerprint: str | None = None
    ) -> DomainData:
        """The samples of the training split, and of the first other, if there is one."""
        used = list(splits.values())[:2]
        texts = (text for split in used for table in split for text in self._texts(table, split is not used[0]))
        if content is None:
            content = store_texts(list(self.templates), texts)
        else:
            deque(texts, maxlen=0)
        digests, labels, domain_names, clients, sources, is_test = zip(*self.samples, strict=True)
        encoded, classes = None, list[str]()
        if None not in labels:
            encoded, classes = encode_names(labels, self.named.get("label"))
        elif any(label is not None for label in labels):
            raise InputError(
                f"data.columns.label: {sources[labels.index(None)]}: found no label, expected one in every row or in "
                "none"
            )
        domain_of, domains = encode_names(domain_names, self.named.get("domain"))
        data = DomainData(
            task=self.task,
            content=content,
            domain_of=domain_of,
            domains=domains,
            labels=encoded,
            classes=classes,
            is_test=np.array(is_test),
            clients=np.array(clients) if any(clients) else None,
            sample_sources=sample_sources(sources),
            fingerprint=fingerprint,
            notes=self.notes + (_repeated(np.array(digests), np.array(is_test)) if self.templates else []),
            given_as=self.given_as,
        )
        return prepare_source(data, self.config, seed, split=not any(is_test))

    def _texts(self, table: Table, is_test: bool) -> Iterator[list[str]]:
        """The texts of every row that has one; adds what else is known to `samples`."""
        before, present = len(self.samples), table.columns
        columns = None if present is None else self.columns(present)
        for source, row in table.rows():
            if columns is None or (table.columns is None and list(row) != present):
                # Lines of a jsonl file may differ.
                others, present = columns, list(row)
                columns = self.columns(present, f"{source}: ")
                if others is not None and columns["domain"] != others["domain"]:
                    found = "no" if columns["domain"] is None else "a"
                    raise InputError(
                        f"data.columns.domain: {source}: found {found} domain, other than in the lines before; "
                        "expected one in every line or in none"
                    )
            texts = [self._fill(name, row, source) for name in self.templates]
            if texts and is_missing(texts[-1]):
                if self.config.unreadable == "error":
                    column = list(self.templates.values())[-1][-1][1]
                    raise InputError(
                        f"{self.given_as}: {source}: found no text in column {column!r}, expected some, or "
                        "data.unreadable skip"
                    )
                self.notes.append(f"{source}: skipped, it has no text")
                continue
            label, domain, client = (self._name(role, columns[role], row, source) for role in _ROLES)
            self.samples.append(
                _Sample(hash(tuple(texts)), label, domain or table.domain, client or "", source, is_test)
            )
            yield texts
        if len(self.samples) == before:
            raise InputError(f"{self.given_as}: found no samples in {table.place!r}, expected some")

    def columns(self, present: list[str], place: str = "") -> _Columns:
        """The columns that are named, which must be among those `present`, or else those of the usual names."""
        for name, template in self.templates.items():
            option = {"prompt": "data.prompt", "text": "data.columns.input"}.get(name, f"data.columns.{name}")
            for _, column in template:
                if column is not None:
                    _require_column(option, column, present, place)
        columns: _Columns = {}
        for role in _ROLES:
            chosen = getattr(self.config.columns, role)
            if chosen is not None or (role == "label" and self.task != "causal_lm"):
                _require_column(f"data.columns.{role}", chosen or role, present, place)
            columns[role] = chosen or (role if role in present else None)
        return columns

    def _name(self, role: str, column: str | None, row: Mapping[str, Any], source: SampleSource) -> str | None:
        """The name of a row's class, domain or client; None where it has none and needs none."""
        if column is None or (role == "label" and self.task == "causal_lm" and is_missing(row[column])):
            return None
        value, known = row[column], self.named.get(role)
        if known is None:
            return name_of(value, role, column, source)
        if value is None or not 0 <= value < len(known):
            raise InputError(
                f"data.columns.{role}: {source}: found {value} in column {column!r}, expected a number from 0 to "
                f"{len(known) - 1}"
            )
        return known[value]

    def _fill(self, name: str, row: Mapping[str, Any], source: SampleSource) -> str:
        pieces = []
        for literal, column in self.templates[name]:
            value = "" if column is None or is_missing(row[column]) else row[column]
            if not isinstance(value, str | int | float) or isinstance(value, bool) or value in (math.inf, -math.inf):
                found = value if isinstance(value, float) else f"a {type(value).__name__}"
                raise InputError(f"{self.given_as}: {source}: found {found} in column {column!r}, expected a text")
            pieces.append(literal + str(value))
        return "".join(pieces)


def _labelled_splits(splits: Splits, label: str, *, numbered: bool = False) -> tuple[Splits, list[str]]:
    """The training split and the first other that tells its classes, as that of a challenge does not; notes on others.

    A label of -1 tells nothing, unless a class of the training split has that name, which none has where labels are
    `numbered`. Where no split has labels, the first without such a column is taken, so that reading it raises the
    error that names the column.
    """

    def has(split: str, is_wanted: Callable[[object], bool]) -> bool:
        return any(is_wanted(row.get(label)) for table in splits[split] for _, row in table.rows())

    def is_minus_one(value: object) -> bool:
        return str(value).strip() in ("-1", "-1.0")

    train, *held_out = splits
    notes, lacking, chosen = list[str](), None, None
    for split in held_out:
        _, first = next((row for table in splits[split] for row in table.rows()), (None, {}))
        if label not in first:
            lacking = lacking or split
        elif has(split, lambda value: not is_missing(value) and not is_minus_one(value)) or (
            not numbered and has(split, is_minus_one) and has(train, is_minus_one)
        ):
            chosen = split
            break
        notes.append(f"{split}: its samples have no labels, so it is not used")
    return {name: splits[name] for name in (train, chosen or lacking) if name is not None}, notes


def _task(data: Dataset, content: str) -> DataTask:
    from datasets import Image, Value

    feature = data.features[content]
    if isinstance(feature, Image):
        return "image_classification"
    if feature in (Value("string"), Value("large_string")):
        return "text_classification"
    raise InputError(f"data.columns.input: found {feature} in column {content!r}, expected images or texts")


def _require_column(option: str, name: str, present: list[str], place: str = "") -> None:
    if name not in present:
        raise InputError(f"{option}: {place}found no column {name!r}, expected one of {listed(present)}")


def _dataset_table(name: str, data: Dataset, used: Collection[str]) -> Table:
    """The columns `used`, so far as they are there, of a split of a data set."""
    present = [column for column in data.column_names if column in used]

    def rows() -> Iterator[Row]:
        batches = data.select_columns(present).with_format("arrow").iter(_AT_ONCE)
        found = (row for batch in batches for row in batch.to_pylist())
        place = f"{name}, row"
        return ((SampleSource(place, number), row) for number, row in enumerate(found))

    return Table(name, rows, columns=data.column_names)


def _repeated(digests: NDArray[np.int64], is_test: NDArray[np.bool_]) -> list[str]:
    """A note on equal texts: those that were trained on measure nothing in a test set."""
    if is_test.any():
        repeated = int(np.isin(digests[is_test], digests[~is_test]).sum())
        where = "of the test set are in the training set, too"
    else:
        repeated = len(digests) - len(np.unique(digests))
        where = "repeat another, so the test set that is drawn may have texts of the training set"
    return [f"texts: {repeated} {where}"] if repeated else []
