"""Data sets of the `datasets` library: saved with `save_to_disk`, or on the hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedra_engine.config import DataConfig
from fedra_engine.data.domain_data import DataTask, DomainData, prepare_source
from fedra_engine.data.names import class_name, encode_names, is_missing, labelled_split, listed, name_of
from fedra_engine.data.origins import Origins
from fedra_engine.data.tables import SUFFIXES, check_encoding
from fedra_engine.runtime.errors import InputError, one_line

if TYPE_CHECKING:
    from datasets import Dataset

ONE_DOMAIN = "all"
"""Name of the only domain of samples that have none."""
HELD_OUT = ("test", "validation", "valid", "val", "dev")
"""Names of splits that are not trained on; the first one that has samples and labels becomes the test set."""


def load_hf_dataset(config: DataConfig, seed: int) -> DomainData:
    """Labelled images or texts, by the type of the column `config.columns.input`.

    Without a split of `HELD_OUT` that has labels, a stratified one is drawn; without a domain column there is one
    domain.

    Raises:
        InputError: no such data set or column, or a column of another type than is needed.
    """
    train, held_out = open_dataset(config)
    columns = config.columns
    content, label = _content_column(train, columns.input), columns.label or "label"
    task = _task(train, content)
    require_column(label, "label", train.column_names)
    split, notes = labelled_split(
        ((name, _values(some, label) if label in some.column_names else None) for name, some in held_out.items()),
        # A class that has a number has no name -1.
        lambda: [] if hasattr(train.features[label], "names") else _values(train, label),
    )
    test = None if split is None else held_out[split]
    domain = optional_column(columns.domain, "domain", train.column_names)
    owner = optional_column(columns.client, "client", train.column_names)
    # One column may have several roles.
    data = _join(train, test, list(dict.fromkeys(name for name in (content, label, domain, owner) if name is not None)))
    origins = _origins(len(train), len(data), split or "test")
    labels, classes = _encoded(data, label, "label", origins)
    domain_of, domains = (
        (np.zeros(len(data), dtype=np.int64), [ONE_DOMAIN])
        if domain is None
        else _encoded(data, domain, "domain", origins)
    )
    clients = None
    if owner is not None:
        owners = zip(_values(data, owner), origins, strict=True)
        clients = np.array(
            ["" if is_missing(value) else name_of(value, "client", owner, origin) for value, origin in owners]
        )
    found = DomainData(
        task=task,
        content=_only(data, content, "image" if task == "image_classification" else "text"),
        domain_of=domain_of,
        domains=domains,
        labels=labels,
        classes=classes,
        is_test=np.arange(len(data)) >= len(train),
        clients=clients,
        origins=origins,
        # Not of `data`: its other columns do not matter to what is made of its content.
        fingerprint=repr((content, _state(train), None if test is None else _state(test))),
        notes=notes,
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
    from datasets import Dataset, load_dataset, load_from_disk

    assert config.root is not None
    check_encoding(config.encoding)
    folder = Path(config.root)
    if not folder.exists() and _is_path(config.root):
        files = "" if config.source == "hf_dataset" else "a csv, tsv, jsonl, parquet or txt file, "
        raise InputError(
            f"data.root: found no {config.root}, expected {files}a folder that save_to_disk made, or the name of a "
            "data set on the hub"
        )
    try:
        if folder.is_dir() and is_saved_dataset(folder):
            if config.subset is not None:
                raise InputError(
                    f"data.subset: found {config.subset!r} with the saved data set {config.root!r}, expected null"
                )
            found = load_from_disk(str(folder))
        else:
            found = load_dataset(config.root, config.subset)
    except InputError:
        raise
    except Exception as error:  # Whatever a file can make the library raise.
        raise InputError(
            f"data.root: cannot load {config.root!r}: {one_line(error)}; expected a folder that save_to_disk made, or "
            "the name of a data set on the hub"
        ) from error
    if isinstance(found, Dataset):
        return found, {}
    if len(found) == 1:
        return next(iter(found.values())), {}
    if "train" not in found:
        raise InputError(f"data.root: found the splits {listed(found)} in {config.root!r}, expected one named train")
    return found["train"], {name: found[name] for name in HELD_OUT if name in found and len(found[name])}


def _is_path(root: str) -> bool:
    """Whether this cannot be the name of a data set on the hub, <owner>/<name> or <name>."""
    return root.startswith(("/", ".", "~")) or Path(root).suffix in SUFFIXES


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


def _content_column(data: Dataset, chosen: str | None) -> str:
    name = chosen or next((name for name in ("image", "text") if name in data.column_names), "image")
    require_column(name, "input", data.column_names)
    return name


def _task(data: Dataset, content: str) -> DataTask:
    from datasets import Image, Value

    feature = data.features[content]
    if isinstance(feature, Image):
        return "image_classification"
    if feature in (Value("string"), Value("large_string")):
        return "text_classification"
    raise InputError(f"data.columns.input: found {feature} in column {content!r}, expected images or texts")


def _join(train: Dataset, test: Dataset | None, columns: list[str]) -> Dataset:
    """These columns of both splits, training samples first."""
    from datasets import concatenate_datasets

    if test is None:
        return train.select_columns(columns)
    for name in columns:
        if name not in test.column_names or test.features[name] != train.features[name]:
            found = test.features[name] if name in test.column_names else "no such column"
            raise InputError(
                f"data.root: column {name!r} of the test split: found {found}, expected {train.features[name]} as in "
                "the training split"
            )
    return concatenate_datasets([train.select_columns(columns), test.select_columns(columns)])


def _origins(train: int, total: int, held_out: str) -> Origins:
    """Split and row of every sample."""
    rows, is_test = np.arange(total), np.arange(total) >= train
    return Origins(["train, row", f"{held_out}, row"], is_test.astype(np.int32), rows - train * is_test)


def _state(data: Dataset) -> tuple[str, list[tuple[int, int]]]:
    """The library's fingerprint of a data set, and size in bytes and time of the last change of each of its files.

    The fingerprint alone stays the same where a generator finds other files, or one of these files is replaced.
    """
    states = map(os.stat, sorted(file["filename"] for file in data.cache_files))
    return data._fingerprint, [(state.st_size, state.st_mtime_ns) for state in states]


def _only(data: Dataset, name: str, new_name: str) -> Dataset:
    column = data.select_columns(name)
    return column if name == new_name else column.rename_column(name, new_name)


def _encoded(data: Dataset, column: str, role: str, origins: Origins) -> tuple[NDArray[np.int64], list[str]]:
    """A column as indices [samples] and what they stand for."""
    from datasets import ClassLabel

    values = _values(data, column)
    feature = data.features[column]
    if not isinstance(feature, ClassLabel):
        rows = zip(values, origins, strict=True)
        if role == "label":
            return encode_names([class_name(value, column, origin) for value, origin in rows])
        return encode_names([name_of(value, role, column, origin) for value, origin in rows])
    indices = np.array([-1 if value is None else value for value in values], dtype=np.int64)
    if len(wrong := np.flatnonzero((indices < 0) | (indices >= len(feature.names)))):
        raise InputError(
            f"data.columns.{role}: {origins[wrong[0]]}: found {values[wrong[0]]} in column {column!r}, expected a "
            f"number from 0 to {len(feature.names) - 1}"
        )
    return indices, list(feature.names)


def _values(data: Dataset, name: str) -> list[Any]:
    values: list[Any] = data.select_columns(name).with_format("arrow")[:][name].to_pylist()
    return values
