"""Texts: classified ones, and ones that a causal language model learns to write."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fedra_engine.config import DataConfig
from fedra_engine.data.domain_data import DataTask, DomainData, prepare_source
from fedra_engine.data.folders import files_below, left_out_notes, visible_entries
from fedra_engine.data.hub import HELD_OUT, ONE_DOMAIN, is_saved_dataset, load_hf_dataset, open_dataset, optional_column
from fedra_engine.data.names import class_name, encode_names, is_missing, labelled_split, listed, name_of
from fedra_engine.data.origins import Origin, Origins
from fedra_engine.data.tables import SUFFIXES, Row, check_encoding, has_tables, read_table, table_files, undecodable
from fedra_engine.data.text_store import TextStore
from fedra_engine.runtime.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

_TRAIN = "train"

_Template = list[tuple[str, str | None]]
"""Literal texts, each with the column whose value follows it."""


class _Source(NamedTuple):
    """Rows of one file or split, `place`; `domain` is None where that does not say."""

    place: str
    domain: str | None
    rows: Callable[[], Iterator[Row]]


class _Splits(NamedTuple):
    """What is trained on, and what may become the test set: by name, the first choice first."""

    train: list[_Source]
    held_out: dict[str, list[_Source]]


@dataclass
class _Records:
    """All rows that can be used: their texts on disk, the rest by column."""

    content: TextStore
    digests: array[int] = field(default_factory=lambda: array("q"))
    """Equal for equal texts."""
    labels: list[str | None] = field(default_factory=list)
    domains: list[str] = field(default_factory=list)
    clients: list[str] = field(default_factory=list)
    is_test: list[bool] = field(default_factory=list)
    origins: list[Origin] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def load_text_classification(config: DataConfig, seed: int) -> DomainData:
    """Texts with a label from files or a data set (docs/data.md).

    Raises:
        InputError: files, columns or lines that cannot be used (the message has file and line).
    """
    if _is_dataset(config):
        data = load_hf_dataset(config, seed)
        if data.task != "text_classification":
            raise InputError("data.columns.input: found images with data.source text_classification, expected texts")
        return data
    return _load(config, seed, "text_classification", {"text": [("", config.columns.input or "text")]})


def load_causal_lm(config: DataConfig, seed: int) -> DomainData:
    """Texts, or prompts with the responses to learn, from files or a data set (docs/data.md).

    Raises:
        InputError: files, columns or lines that cannot be used (the message has file and line).
    """
    if config.prompt is None:
        return _load(config, seed, "causal_lm", {"prompt": [], "response": [("", config.columns.input or "text")]})
    response: _Template = [("", config.columns.response or "response")]
    return _load(config, seed, "causal_lm", {"prompt": _parse(config.prompt), "response": response})


def _load(config: DataConfig, seed: int, task: DataTask, templates: dict[str, _Template]) -> DomainData:
    splits = _splits(config)
    files = [Path(source.place) for sources in (splits.train, *splits.held_out.values()) for source in sources]
    check_encoding(config.encoding, files)
    records = _Records(TextStore(list(templates)))
    if (root := Path(str(config.root))).is_dir() and not _is_dataset(config):
        left_out = {file for entry in visible_entries(root) for file in files_below(entry)} - set(files)
        records.notes += left_out_notes(root, left_out, f"{' '.join(SUFFIXES)} files, laid out as docs/data.md says")
    try:
        _add_all(records, splits.train, config, task, templates, is_test=False)
        test = next(iter(splits.held_out), None)
        if task == "text_classification":
            column = config.columns.label or "label"
            labels = ((name, _labels(sources, column)) for name, sources in splits.held_out.items())
            test, records.notes[:0] = labelled_split(labels, lambda: records.labels)
        if test is not None:
            _add_all(records, splits.held_out[test], config, task, templates, is_test=True)
    except UnicodeError as error:
        raise InputError(
            f"data.encoding: found no {config.encoding} text in {undecodable(files, config.encoding)}; expected the "
            "encoding of all files"
        ) from error
    return _as_data(records, config, seed, task, split=test is None)


def _labels(sources: list[_Source], column: str) -> Iterator[object] | None:
    """The labels of a split; None if it has no such column."""
    rows = (row for source in sources for _, row in source.rows())
    first = next(rows, {})
    return (row.get(column) for row in chain([first], rows)) if column in first else None


def _add_all(
    records: _Records,
    sources: list[_Source],
    config: DataConfig,
    task: DataTask,
    templates: dict[str, _Template],
    *,
    is_test: bool,
) -> None:
    for source in sources:
        before = len(records.domains)
        _add(records, source, config, task, templates)
        if len(records.domains) == before:
            raise InputError(f"data.root: found no samples in {source.place!r}, expected some")
    records.is_test += [is_test] * (len(records.domains) - len(records.is_test))


def _add(
    records: _Records, source: _Source, config: DataConfig, task: DataTask, templates: dict[str, _Template]
) -> None:
    columns, present = config.columns, None
    label = domain = client = before = None
    for origin, row in source.rows():
        if present is None or list(row) != present:
            # Lines of a jsonl file may differ.
            is_first, present = present is None, list(row)
            _check_templates(templates, present, origin)
            label = optional_column(columns.label, "label", present)
            before, domain = domain, optional_column(columns.domain, "domain", present)
            if not is_first and domain != before:
                raise InputError(
                    f"data.columns.domain: {origin}: found {'no' if domain is None else 'a'} domain, other than in the "
                    "lines before; expected one in every line or in none"
                )
            client = optional_column(columns.client, "client", present)
            if task == "text_classification" and label is None:
                raise InputError(
                    f"data.columns.label: {origin}: found no column 'label', expected one of {listed(present)}"
                )
        content = {name: _fill(template, row, origin) for name, template in templates.items()}
        role, text = list(content.items())[-1]
        if is_missing(text):
            column = templates[role][-1][1]
            if config.unreadable == "error":
                raise InputError(
                    f"data.root: {origin}: found no text in column {column!r}, expected some, or data.unreadable skip"
                )
            records.notes.append(f"{origin}: skipped, it has no text")
            continue
        records.content.append(content)
        records.digests.append(hash(tuple(content.values())))
        records.labels.append(
            None
            if label is None or (task == "causal_lm" and is_missing(row[label]))
            else class_name(row[label], label, origin)
        )
        records.domains.append(
            source.domain or ONE_DOMAIN if domain is None else name_of(row[domain], "domain", domain, origin)
        )
        records.clients.append(
            "" if client is None or is_missing(row[client]) else name_of(row[client], "client", client, origin)
        )
        records.origins.append(origin)


def _fill(template: _Template, row: Mapping[str, object], origin: Origin) -> str:
    pieces = []
    for literal, column in template:
        value = "" if column is None or is_missing(row[column]) else row[column]
        if not isinstance(value, str | int | float) or isinstance(value, bool) or value in (math.inf, -math.inf):
            found = value if isinstance(value, float) else f"a {type(value).__name__}"
            raise InputError(f"data.root: {origin}: found {found} in column {column!r}, expected a text")
        pieces.append(literal + str(value))
    return "".join(pieces)


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


def _check_templates(templates: dict[str, _Template], present: list[str], origin: Origin) -> None:
    for role, template in templates.items():
        for _, column in template:
            if column is not None and column not in present:
                name = {"prompt": "data.prompt", "text": "data.columns.input"}.get(role, f"data.columns.{role}")
                raise InputError(f"{name}: {origin}: found no column {column!r}, expected one of {listed(present)}")


def _as_data(records: _Records, config: DataConfig, seed: int, task: DataTask, *, split: bool) -> DomainData:
    labels, classes = None, list[str]()
    named = [label for label in records.labels if label is not None]
    if len(named) == len(records.labels):
        labels, classes = encode_names(named)
    elif named:
        row = records.labels.index(None)
        raise InputError(
            f"data.columns.label: {records.origins[row]}: found no label, expected one in every row or in none"
        )
    domain_of, domains = encode_names(records.domains)
    data = DomainData(
        task=task,
        content=records.content.close(),
        domain_of=domain_of,
        domains=domains,
        labels=labels,
        classes=classes,
        is_test=np.array(records.is_test),
        clients=np.array(records.clients) if any(records.clients) else None,
        origins=Origins.of(records.origins),
        notes=[*records.notes, *_repeated(records, split=split)],
    )
    return prepare_source(data, config, seed, split=split)


def _repeated(records: _Records, *, split: bool) -> list[str]:
    """A note on equal texts: those that were trained on measure nothing in a test set."""
    digests, is_test = np.array(records.digests), np.array(records.is_test)
    if split:
        repeated = len(digests) - len(np.unique(digests))
        where = "repeat another, so the test set that is drawn may have texts of the training set"
    else:
        repeated = int(np.isin(digests[is_test], digests[~is_test]).sum())
        where = "of the test set are in the training set, too"
    return [f"texts: {repeated} {where}"] if repeated else []


def _is_dataset(config: DataConfig) -> bool:
    """Whether `config.root` is no file or folder of files."""
    assert config.root is not None
    root = Path(config.root)
    return not root.is_file() and (not root.is_dir() or is_saved_dataset(root))


def _splits(config: DataConfig) -> _Splits:
    """The files or splits of `config.root`."""
    assert config.root is not None
    if _is_dataset(config):
        return _of_dataset(config)
    if config.subset is not None:
        raise InputError(f"data.subset: found {config.subset!r} with files, {config.root!r}; expected null")
    root = Path(config.root)
    if root.is_file():
        return _Splits([_source(root, None, config)], {})
    folders = {entry.name: entry for entry in visible_entries(root) if entry.is_dir()}
    if names := _held_out(folders):
        # Beside a test set, the others may hold anything.
        names = [name for name in names if name == names[0] or has_tables(folders[name])]
        train, *held_out = (
            [_source(file, file.stem, config) for file in table_files(folders[name])] for name in (_TRAIN, *names)
        )
        return _Splits(train, dict(zip(names, held_out, strict=True)))
    files = {file.stem: file for file in table_files(root)}
    names = _held_out(files)
    if names and (others := files.keys() - {_TRAIN, *HELD_OUT}):
        raise InputError(
            f"data.root: found {files[min(others)].name!r} beside {files[names[0]].name!r} in {str(root)!r}, expected "
            "files of the splits alone, or one file per domain"
        )
    if not names:
        return _Splits([_source(file, domain, config) for domain, file in files.items()], {})
    train, *held_out = ([_source(files[name], None, config)] for name in (_TRAIN, *names))
    return _Splits(train, dict(zip(names, held_out, strict=True)))


def _source(file: Path, domain: str | None, config: DataConfig) -> _Source:
    return _Source(str(file), domain, lambda: read_table(file, config.encoding))


def _held_out(names: Collection[str]) -> list[str]:
    """Which of `names` may be the test set, the first choice first, if one of them is the training set."""
    return [name for name in HELD_OUT if _TRAIN in names and name in names]


def _of_dataset(config: DataConfig) -> _Splits:
    train, held_out = open_dataset(config)

    def source(name: str, data: Dataset) -> _Source:
        return _Source(name, None, lambda: ((Origin(f"{name}, row", row), values) for row, values in enumerate(data)))

    return _Splits([source(_TRAIN, train)], {name: [source(name, data)] for name, data in held_out.items()})
