"""Data sets of the `datasets` library: saved with `save_to_disk`, or on the hub."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedra_engine.config import DataConfig
from fedra_engine.data import names
from fedra_engine.data.domain_data import DataTask, DomainData, prepare_source
from fedra_engine.data.names import SampleSource, listed
from fedra_engine.data.sources.tables import SUFFIXES, check_encoding
from fedra_engine.runtime.errors import InputError, one_line

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

ONE_DOMAIN = "all"
"""Name of the only domain of samples that have none."""
HELD_OUT = ("test", "validation", "valid", "val", "dev")
"""Names of splits that are not trained on; the first one that has samples and labels becomes the test set."""
_CONTENT = {"image_classification": "image", "text_classification": "text"}
"""The column of a task's content."""


def load_hf_dataset(config: DataConfig, seed: int) -> DomainData:
    """Labelled images or texts, by the type of the column `config.columns.input`.

    Without a split of `HELD_OUT` that has labels, a stratified one is drawn; without a domain column there is one
    domain.

    Raises:
        InputError: no such data set or column, or a column of another type than is needed.
    """
    return labelled_samples(*open_dataset(config), config, seed)


def labelled_samples(
    train: Dataset, held_out: dict[str, Dataset], config: DataConfig, seed: int, given_as: str = "data.root"
) -> DomainData:
    """Those of `load_hf_dataset`, of splits as `open_dataset` returns them; `given_as` names these in messages.

    Raises:
        InputError: no such column, or a column of another type than is needed.
    """
    columns, present = config.columns, train.column_names
    content = columns.input or next((name for name in ("image", "text") if name in present), "image")
    require_column(content, "input", present)
    task, label = _task(train, content), columns.label or "label"
    require_column(label, "label", present)
    split, notes = names.labelled_split(
        ((name, _values(data, label) if label in data.column_names else None) for name, data in held_out.items()),
        # A class that has a number has no name -1.
        lambda: [] if hasattr(train.features[label], "names") else _values(train, label),
    )
    test = None if split is None else held_out[split]
    domain = optional_column(columns.domain, "domain", present)
    client = optional_column(columns.client, "client", present)
    # One column may have several roles.
    used = list(dict.fromkeys(name for name in (content, label, domain, client) if name is not None))
    data = _join(train, test, used, given_as)
    sources = names.sample_sources(
        SampleSource(f"{name}, row", row)
        for name, count in (("train", len(train)), (split or "test", len(data) - len(train)))
        for row in range(count)
    )
    labels, classes = _encoded(data, label, "label", sources)
    domain_of, domains = np.zeros(len(data), dtype=np.int64), [ONE_DOMAIN]
    if domain is not None:
        domain_of, domains = _encoded(data, domain, "domain", sources)
    clients = None
    if client is not None:
        values = zip(_values(data, client), itertools.starmap(SampleSource, sources), strict=True)
        clients = np.array([names.client_name(value, client, source) for value, source in values])
    found = DomainData(
        task=task,
        content=data.select_columns(content).rename_columns({content: _CONTENT[task]}),
        domain_of=domain_of,
        domains=domains,
        labels=labels,
        classes=classes,
        is_test=np.arange(len(data)) >= len(train),
        clients=clients,
        sample_sources=sources,
        # Not of `data`: its other columns do not matter to what is made of its content.
        fingerprint=repr((content, _state(train), None if test is None else _state(test))),
        notes=notes,
        given_as=given_as,
    )
    return prepare_source(found, config, seed, split=test is None)


def is_saved_dataset(folder: Path) -> bool:
    """Whether `folder` was made by `save_to_disk`."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "dataset_info.json"))


def open_dataset(config: DataConfig) -> tuple[Dataset, dict[str, Dataset]]:
    """The training split of the data set that `config.root` names, and those of `HELD_OUT` that have samples.

    Raises:
        InputError: there is none, or it has several splits and none of them is `train`.
    """
    from datasets import load_dataset, load_from_disk

    assert config.root is not None
    check_encoding(config.encoding)
    folder = Path(config.root)
    # What cannot be the name of a data set on the hub, <owner>/<name> or <name>.
    is_path = config.root.startswith(("/", ".", "~")) or folder.suffix in SUFFIXES
    if is_path and not folder.exists():
        files = "" if config.source == "hf_dataset" else "a csv, tsv, jsonl, parquet or txt file, "
        raise InputError(
            f"data.root: found no {config.root}, expected {files}a folder that save_to_disk made, or the name of a "
            "data set on the hub"
        )
    is_saved = folder.is_dir() and is_saved_dataset(folder)
    if is_saved and config.subset is not None:
        raise InputError(f"data.subset: found {config.subset!r} with the saved data set {config.root!r}, expected null")
    try:
        found = load_from_disk(str(folder)) if is_saved else load_dataset(config.root, config.subset)
    except Exception as error:  # Whatever a file can make the library raise.
        raise InputError(
            f"data.root: cannot load {config.root!r}: {one_line(error)}; expected a folder that save_to_disk made, or "
            "the name of a data set on the hub"
        ) from error
    return splits_of(found, "data.root", f" in {config.root!r}")


def splits_of(found: Dataset | DatasetDict, given_as: str, place: str = "") -> tuple[Dataset, dict[str, Dataset]]:
    """The training split of a data set, and those of `HELD_OUT` that have samples.

    Raises:
        InputError: it is none, or has several splits and none of them is `train`.
    """
    from datasets import Dataset, DatasetDict

    if isinstance(found, Dataset):
        return found, {}
    if not isinstance(found, DatasetDict):
        kind = type(found).__name__
        raise InputError(f"{given_as}: found a {kind}, expected a Dataset or DatasetDict of the datasets library")
    if len(found) == 1:
        return next(iter(found.values())), {}
    if "train" not in found:
        raise InputError(f"{given_as}: found the splits {listed(found)}{place}, expected one named train")
    return found["train"], {name: found[name] for name in HELD_OUT if name in found and len(found[name])}


def optional_column(chosen: str | None, default: str, present: list[str]) -> str | None:
    """The column to use: what was asked for, which must be there, else the default if that is there.

    Raises:
        InputError: the chosen column is not there.
    """
    if chosen is not None:
        require_column(chosen, default, present)
        return chosen
    return default if default in present else None


def require_column(name: str, role: str, present: list[str]) -> None:
    """Raise InputError unless `name`, the column of `role`, is there."""
    if name not in present:
        raise InputError(f"data.columns.{role}: found no column {name!r}, expected one of {listed(present)}")


def _task(data: Dataset, content: str) -> DataTask:
    from datasets import Image, Value

    feature = data.features[content]
    if isinstance(feature, Image):
        return "image_classification"
    if feature in (Value("string"), Value("large_string")):
        return "text_classification"
    raise InputError(f"data.columns.input: found {feature} in column {content!r}, expected images or texts")


def _join(train: Dataset, test: Dataset | None, columns: list[str], given_as: str) -> Dataset:
    """These columns of both splits, training samples first."""
    from datasets import concatenate_datasets

    if test is None:
        return train.select_columns(columns)
    for name in columns:
        if name not in test.column_names or test.features[name] != train.features[name]:
            found = test.features[name] if name in test.column_names else "no such column"
            raise InputError(
                f"{given_as}: column {name!r} of the test split: found {found}, expected {train.features[name]} as in "
                "the training split"
            )
    return concatenate_datasets([train.select_columns(columns), test.select_columns(columns)])


def _state(data: Dataset) -> tuple[str, list[tuple[int, int]]]:
    """The library's fingerprint of a data set, and size in bytes and time of the last change of each of its files.

    The fingerprint alone stays the same where a generator finds other files, or one of these files is replaced.
    """
    states = map(os.stat, sorted(file["filename"] for file in data.cache_files))
    return data._fingerprint, [(state.st_size, state.st_mtime_ns) for state in states]


def _encoded(data: Dataset, column: str, role: str, sources: NDArray[np.void]) -> tuple[NDArray[np.int64], list[str]]:
    """A column as indices [samples] and what they stand for."""
    values = _values(data, column)
    known = getattr(data.features[column], "names", None)
    if known is None:
        rows = zip(values, itertools.starmap(SampleSource, sources), strict=True)
        if role == "label":
            return names.encode_names([names.class_name(value, column, source) for value, source in rows])
        return names.encode_names([names.name_of(value, role, column, source) for value, source in rows])
    indices = np.array([-1 if value is None else value for value in values], dtype=np.int64)
    if len(wrong := np.flatnonzero((indices < 0) | (indices >= len(known)))):
        raise InputError(
            f"data.columns.{role}: {SampleSource(*sources[wrong[0]])}: found {values[wrong[0]]} in column {column!r}, "
            f"expected a number from 0 to {len(known) - 1}"
        )
    return indices, list(known)


def _values(data: Dataset, name: str) -> list[Any]:
    values: list[Any] = data.select_columns(name).with_format("arrow")[:][name].to_pylist()
    return values
