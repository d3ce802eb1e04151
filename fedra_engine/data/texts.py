"""Texts: classified ones, and ones that a causal language model learns to write."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from string import Formatter
from typing import NamedTuple

import numpy as np

from fedra_engine.config import DataConfig
from fedra_engine.data.domain_data import DataTask, DomainData, prepare_source
from fedra_engine.data.folders import visible_entries
from fedra_engine.data.hub import ONE_DOMAIN, is_saved_dataset, load_hf_dataset, open_dataset, optional_column
from fedra_engine.data.names import client_name, encode_names
from fedra_engine.data.origins import Origin, Origins
from fedra_engine.data.tables import READERS, Row, read_table
from fedra_engine.data.text_store import TextStore
from fedra_engine.errors import InputError

_TRAIN = "train"
_HELD_OUT = ("test", "validation", "valid", "val", "dev")
"""Names of splits that are not trained on; the first one that is there becomes the test set."""

_Template = list[tuple[str, str | None]]
"""Literal texts, each with the column whose value follows it."""


class _Source(NamedTuple):
    """Rows of one file or split, `place`; `domain` and `split` are None where that does not say."""

    place: str
    domain: str | None
    split: str | None
    rows: Iterator[Row]


@dataclass
class _Records:
    """All rows that can be used: their texts on disk, the rest by column."""

    content: TextStore
    digests: array[int] = field(default_factory=lambda: array("q"))
    """Equal for equal texts."""
    labels: list[object] = field(default_factory=list)
    domains: list[object] = field(default_factory=list)
    clients: list[str] = field(default_factory=list)
    is_test: list[bool] = field(default_factory=list)
    origins: list[Origin] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


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
    sources = _sources(config)
    records = _Records(TextStore(list(templates)))
    for source in sources:
        before = len(records.domains)
        _add(records, source, config, task, templates)
        if len(records.domains) == before:
            raise InputError(f"data.root: found no samples in {source.place!r}, expected some")
    return _as_data(records, config, seed, task, split=sources[0].split is None)


def _add(
    records: _Records, source: _Source, config: DataConfig, task: DataTask, templates: dict[str, _Template]
) -> None:
    columns, present = config.columns, None
    label = domain = client = before = None
    for origin, row in source.rows:
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
                raise InputError(f"data.columns.label: {origin}: found no column 'label', expected one of {present}")
        content = {name: _fill(template, row, origin) for name, template in templates.items()}
        *_, last = content.values()
        if not last.strip():
            if config.unreadable == "error":
                raise InputError(f"data.root: {origin}: found no text, expected some, or data.unreadable skip")
            records.skipped.append(f"{origin}: skipped, it has no text")
            continue
        records.content.append(content)
        records.digests.append(hash(tuple(content.values())))
        records.labels.append(None if label is None else row[label])
        records.domains.append(row[domain] if domain is not None else source.domain or ONE_DOMAIN)
        records.clients.append("" if client is None else client_name(row[client], origin))
        records.is_test.append(source.split == "test")
        records.origins.append(origin)


def _fill(template: _Template, row: Mapping[str, object], origin: Origin) -> str:
    pieces = []
    for literal, column in template:
        value = None if column is None else row[column]
        if not isinstance(value, str | int | float | None) or isinstance(value, bool):
            raise InputError(
                f"data.root: {origin}: found a {type(value).__name__} in column {column!r}, expected a text"
            )
        pieces.append(literal + ("" if value is None else str(value)))
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
                raise InputError(f"{name}: {origin}: found no column {column!r}, expected one of {', '.join(present)}")


def _as_data(records: _Records, config: DataConfig, seed: int, task: DataTask, *, split: bool) -> DomainData:
    labels, classes = None, list[str]()
    if all(label is not None for label in records.labels):
        labels, classes = encode_names(records.labels, lambda row: f"data.columns.label: {records.origins[row]}")
    elif task == "text_classification" or any(label is not None for label in records.labels):
        row = next(row for row, label in enumerate(records.labels) if label is None)
        raise InputError(f"data.columns.label: {records.origins[row]}: found no label, expected one")
    domain_of, domains = encode_names(records.domains, lambda row: f"data.columns.domain: {records.origins[row]}")
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
        notes=[*records.skipped, *_repeated(records, split=split)],
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


def _sources(config: DataConfig) -> list[_Source]:
    """The files or splits of `config.root`; either all say which split they are, or none does."""
    if _is_dataset(config):
        return _dataset_sources(config)
    assert config.root is not None
    if config.subset is not None:
        raise InputError(f"data.subset: found {config.subset!r} with files, {config.root!r}; expected null")
    root = Path(config.root)
    if root.is_file():
        return [_Source(str(root), None, None, read_table(_checked(root)))]
    held_out = _held_out({entry.name for entry in visible_entries(root) if entry.is_dir()})
    if held_out is not None:
        splits = {_TRAIN: root / _TRAIN, "test": root / held_out}
        return [
            _Source(str(file), file.stem, split, read_table(file))
            for split, at in splits.items()
            for file in _files(at)
        ]
    files = {file.stem: file for file in _files(root)}
    held_out = _held_out(files.keys())
    if held_out is not None:
        if others := files.keys() - {_TRAIN, *_HELD_OUT}:
            raise InputError(
                f"data.root: found {files[min(others)].name!r} beside {files[held_out].name!r} in {str(root)!r}, "
                "expected files of the splits alone, or one file per domain"
            )
        splits = {_TRAIN: files[_TRAIN], "test": files[held_out]}
        return [_Source(str(file), None, split, read_table(file)) for split, file in splits.items()]
    return [_Source(str(file), domain, None, read_table(file)) for domain, file in files.items()]


def _held_out(names: Set[str]) -> str | None:
    """Which of `names` is the test set, if one is the training set."""
    return next((name for name in _HELD_OUT if _TRAIN in names and name in names), None)


def _dataset_sources(config: DataConfig) -> list[_Source]:
    train, test = open_dataset(config)
    splits = [("train", train)] if test is None else [("train", train), ("test", test)]
    return [
        _Source(
            name,
            None,
            None if test is None else name,
            ((Origin(f"{name}, row", row), values) for row, values in enumerate(data)),
        )
        for name, data in splits
    ]


def _files(folder: Path) -> list[Path]:
    files = [file for file in visible_entries(folder) if file.suffix.lower() in READERS]
    if not files:
        raise InputError(f"data.root: found no {' '.join(READERS)} files in {str(folder)!r}, expected one per domain")
    stems = [file.stem for file in files]
    for file, stem in zip(files, stems, strict=True):
        if stems.count(stem) > 1:
            raise InputError(f"data.root: found several files {file.with_suffix('.*')}, expected one per domain")
    return files


def _checked(file: Path) -> Path:
    if file.suffix.lower() not in READERS:
        raise InputError(f"data.root: found {str(file)!r}, expected a file that ends in one of {' '.join(READERS)}")
    return file
