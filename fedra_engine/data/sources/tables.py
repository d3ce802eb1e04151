"""Samples of tables (files and data sets): labelled images and texts, and texts for causal language models."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING, Any

import numpy as np

import fedra_engine.data.sources.files as files
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
from fedra_engine.data.sources.conversations import conversation
from fedra_engine.data.sources.data_sets import dataset_state, dataset_table, is_saved, joined, open_dataset
from fedra_engine.runtime.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

_ROLES = ("label", "domain", "client")

_Template = list[tuple[str, str | None]]
"""Literal texts, and the column that follows each."""
_Templates = dict[str, _Template]
"""Templates of a sample's texts, by name; the last text must not be empty."""


def load_tables(config: DataConfig, seed: int) -> DomainData:
    """The samples of `config.root`: a data set or, unless `config.source` is `hf_dataset`, a file or folder of files.

    Raises:
        InputError: a file, column or line cannot be used (the message has file and line).
    """
    root = Path(str(config.root))
    if config.source == "hf_dataset" or not (root.is_file() or (root.is_dir() and not is_saved(root))):
        data = dataset_samples(open_dataset(config), config, seed)
        if config.source == "text_classification" and data.task != config.source:
            raise InputError("data.columns.input: found images with data.source text_classification, expected texts")
        return data
    splits, paths, notes = files.table_splits(config)
    task: DataTask = "causal_lm" if config.source == "causal_lm" else "text_classification"
    try:
        if task == "text_classification":
            splits, hidden = _labelled_splits(splits, config.columns.label or "label")
            notes = hidden + notes
        return _Reader(config, task, _templates(config), notes=notes).read(splits, seed)
    except UnicodeError as error:
        raise InputError(
            f"data.encoding: found no {config.encoding} text in {files.undecodable(paths, config.encoding)}; expected "
            "the encoding of all files"
        ) from error


def dataset_samples(
    splits: dict[str, Dataset], config: DataConfig, seed: int, given_as: str = "data.root"
) -> DomainData:
    """Samples of a data set: texts if `config.source` is `causal_lm`, else labelled images or texts.

    The type of the column tells images from texts. If no split can be the test set, `seed` draws a stratified one.
    Without a domain column there is one domain.

    Args:
        splits: as `splits_of` returns them.
        config: of the source.
        seed: of the experiment.
        given_as: name of the data set in messages.

    Raises:
        InputError: a column is missing or has the wrong type, or a row cannot be used.
    """
    from datasets import Image, Value

    if config.source == "causal_lm":
        templates = _templates(config)
        used = [column for template in templates.values() for _, column in template if column is not None]
        used += [getattr(config.columns, role) or role for role in _ROLES]
        tables = {name: [dataset_table(name, data, used)] for name, data in splits.items()}
        return _Reader(config, "causal_lm", templates, given_as).read(tables, seed)
    train = splits[files.TRAIN]
    content = config.columns.input or next((name for name in ("image", "text") if name in train.column_names), "image")
    _require_column("data.columns.input", content, train.column_names)
    feature = train.features[content]
    is_text = feature in (Value("string"), Value("large_string"))
    if not is_text and not isinstance(feature, Image):
        raise InputError(f"data.columns.input: found {feature} in column {content!r}, expected images or texts")
    task: DataTask = "text_classification" if is_text else "image_classification"
    reader = _Reader(config, task, {}, given_as)
    columns = reader.columns(train.column_names)
    known = {role: getattr(train.features.get(columns[role]), "names", None) for role in ("label", "domain")}
    reader.named = {role: names for role, names in known.items() if names is not None}
    used = [name for name in columns.values() if name is not None]
    # The training split decides which columns have roles.
    tables = {name: [dataset_table(name, data, used)._replace(columns=used)] for name, data in splits.items()}
    tables, reader.notes = _labelled_splits(tables, str(columns["label"]), numbered="label" in reader.named)
    test = next((splits[name] for name in tables if name != files.TRAIN), None)
    # One column may have several roles.
    data = joined(train, test, list(dict.fromkeys([content, *used])), given_as).select_columns(content)
    # Not that of `data`, which depends on the other columns in use.
    fingerprint = repr((content, dataset_state(train), None if test is None else dataset_state(test)))
    return reader.read(tables, seed, data.rename_columns({content: "text" if is_text else "image"}), fingerprint)


def _templates(config: DataConfig) -> _Templates:
    plain: _Template = [("", config.columns.input or "text")]
    if config.source != "causal_lm":
        return {"text": plain}
    if config.columns.messages is not None:
        return {"messages": [("", config.columns.messages)], "response": []}
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
    return {
        "prompt": [(literal, column) for literal, column, _, _ in pieces],
        "response": [("", config.columns.response or "response")],
    }


@dataclass
class _Reader:
    """Makes samples from the rows of tables.

    Attributes:
        templates: of the texts; empty if the content is a column of a data set.
        named: names of the integers in a `ClassLabel` column, by role.
        samples: of each: hash of its texts, label, domain, client, source, and whether it is a test sample.
    """

    config: DataConfig
    task: DataTask
    templates: _Templates
    given_as: str = "data.root"
    named: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    samples: list[tuple[Any, ...]] = field(default_factory=list)

    def read(
        self, splits: files.Splits, seed: int, content: Dataset | None = None, fingerprint: str | None = None
    ) -> DomainData:
        """The samples of the training split and of the split after it, if any."""
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
        # A text that is also in the training set measures nothing.
        digest, held_out = np.array(digests), np.array(is_test)
        repeated = len(digest) - len(np.unique(digest))
        where = "repeat another, so the test set that is drawn may have texts of the training set"
        if held_out.any():
            repeated = int(np.isin(digest[held_out], digest[~held_out]).sum())
            where = "of the test set are in the training set, too"
        if repeated and self.templates:
            self.notes.append(f"texts: {repeated} {where}")
        data = DomainData(
            task=self.task,
            content=content,
            domain_of=domain_of,
            domains=domains,
            labels=encoded,
            classes=classes,
            is_test=held_out,
            clients=np.array(clients) if any(clients) else None,
            sample_sources=sample_sources(sources),
            fingerprint=fingerprint,
            notes=self.notes,
            given_as=self.given_as,
        )
        return prepare_source(data, self.config, seed, split=not held_out.any())

    def _texts(self, table: files.Table, is_test: bool) -> Iterator[list[str]]:
        """Yield the texts of every row that is not empty, and add to `samples`."""
        before, present = len(self.samples), table.columns
        columns = None if present is None else self.columns(present)
        for source, row in table.rows():
            if columns is None or (table.columns is None and list(row) != present):
                # Lines of a jsonl file may have different columns.
                others, present = columns, list(row)
                columns = self.columns(present, f"{source}: ")
                if others is not None and columns["domain"] != others["domain"]:
                    found = "no" if columns["domain"] is None else "a"
                    raise InputError(
                        f"data.columns.domain: {source}: found {found} domain, other than in the lines before; "
                        "expected one in every line or in none"
                    )
            texts = self._texts_of(row, source)
            if texts and is_missing(texts[-1]):
                what = "question with an answer at the end" if "messages" in self.templates else "text"
                if self.config.unreadable == "error":
                    column = self.config.columns.messages or list(self.templates.values())[-1][-1][1]
                    raise InputError(
                        f"{self.given_as}: {source}: found no {what} in column {column!r}, expected some, or "
                        "data.unreadable skip"
                    )
                self.notes.append(f"{source}: skipped, it has no {what}")
                continue
            label, domain, client = (self._name(role, columns[role], row, source) for role in _ROLES)
            self.samples.append((hash(tuple(texts)), label, domain or table.domain, client or "", source, is_test))
            yield texts
        if len(self.samples) == before:
            raise InputError(f"{self.given_as}: found no samples in {table.place!r}, expected some")

    def columns(self, present: list[str], place: str = "") -> dict[str, str | None]:
        """The column of each of `_ROLES`: the configured one, else that of the role's name, if present, else None."""
        for name, template in self.templates.items():
            option = {"prompt": "data.prompt", "text": "data.columns.input"}.get(name, f"data.columns.{name}")
            for _, column in template:
                if column is not None:
                    _require_column(option, column, present, place)
        columns: dict[str, str | None] = {}
        for role in _ROLES:
            chosen = getattr(self.config.columns, role)
            if chosen is not None or (role == "label" and self.task != "causal_lm"):
                _require_column(f"data.columns.{role}", chosen or role, present, place)
            columns[role] = chosen or (role if role in present else None)
        return columns

    def _name(self, role: str, column: str | None, row: Mapping[str, Any], source: SampleSource) -> str | None:
        """The name of a row's class, domain or client; None if it has none and needs none."""
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

    def _texts_of(self, row: Mapping[str, Any], source: SampleSource) -> list[str]:
        """The texts of a row, one for each template."""
        if "messages" in self.templates:
            column = str(self.config.columns.messages)
            return conversation(row[column], column, source, self.given_as)
        return [self._fill(name, row, source) for name in self.templates]

    def _fill(self, name: str, row: Mapping[str, Any], source: SampleSource) -> str:
        pieces = []
        for literal, column in self.templates[name]:
            value = "" if column is None or is_missing(row[column]) else row[column]
            if not isinstance(value, str | int | float) or isinstance(value, bool) or value in (math.inf, -math.inf):
                found = value if isinstance(value, float) else f"a {type(value).__name__}"
                raise InputError(f"{self.given_as}: {source}: found {found} in column {column!r}, expected a text")
            pieces.append(literal + str(value))
        return "".join(pieces)


def _labelled_splits(splits: files.Splits, label: str, *, numbered: bool = False) -> tuple[files.Splits, list[str]]:
    """The training split and the first other split with labels (benchmarks may withhold them); notes on the rest.

    A label of -1 is no label, unless the training split has a class of that name; with `numbered` labels it cannot. If
    no split has labels, the first one without the column is returned, so that reading it raises an error that names
    the column.
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


def _require_column(option: str, name: str, present: list[str], place: str = "") -> None:
    if name not in present:
        raise InputError(f"{option}: {place}found no column {name!r}, expected one of {listed(present)}")
