"""Data sets of the `datasets` library: opening them, their splits, and their rows as tables."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import fedra_engine.data.sources.files as files
from fedra_engine.config import DataConfig
from fedra_engine.data.domain_data import SampleSource, listed
from fedra_engine.runtime.errors import InputError, one_line

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

_AT_ONCE = 32
"""Rows of a data set in memory."""


def dataset_table(name: str, data: Dataset, used: Collection[str]) -> files.Table:
    """A split of a data set; its rows have those of the columns `used` that are present."""
    present = [column for column in data.column_names if column in used]

    def rows() -> Iterator[files.Row]:
        batches = data.select_columns(present).with_format("arrow").iter(_AT_ONCE)
        found = (row for batch in batches for row in batch.to_pylist())
        place = f"{name}, row"
        return ((SampleSource(place, number), row) for number, row in enumerate(found))

    return files.Table(name, rows, columns=data.column_names)


def is_saved(folder: Path) -> bool:
    """Whether `folder` was made by `save_to_disk`."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "dataset_info.json"))


def open_dataset(config: DataConfig) -> dict[str, Dataset]:
    """The splits of the data set that `config.root` names."""
    from datasets import load_dataset, load_from_disk

    assert config.root is not None
    files.check_encoding(config.encoding)
    folder = Path(config.root)
    # A data set on the hub is called <owner>/<name> or <name>.
    is_path = config.root.startswith(("/", ".", "~")) or folder.suffix in files.SUFFIXES
    if is_path and not folder.exists():
        kinds = "" if config.source == "hf_dataset" else "a csv, tsv, jsonl, parquet or txt file, "
        raise InputError(
            f"data.root: found no {config.root}, expected {kinds}a folder that save_to_disk made, or the name of a "
            "data set on the hub"
        )
    saved = folder.is_dir() and is_saved(folder)
    if saved and config.subset is not None:
        raise InputError(f"data.subset: found {config.subset!r} with the saved data set {config.root!r}, expected null")
    try:
        found = load_from_disk(str(folder)) if saved else load_dataset(config.root, config.subset)
    except Exception as error:  # Whatever a file can make the library raise.
        raise InputError(
            f"data.root: cannot load {config.root!r}: {one_line(error)}; expected a folder that save_to_disk made, or "
            "the name of a data set on the hub"
        ) from error
    return splits_of(found, "data.root", f" in {config.root!r}")


def splits_of(found: Dataset | DatasetDict, given_as: str, place: str = "") -> dict[str, Dataset]:
    """The training split of a data set, then those of `HELD_OUT` that have samples.

    Raises:
        InputError: `found` is not a data set, or has several splits but no `train`.
    """
    from datasets import Dataset, DatasetDict

    if isinstance(found, Dataset):
        return {files.TRAIN: found}
    if not isinstance(found, DatasetDict):
        kind = type(found).__name__
        raise InputError(f"{given_as}: found a {kind}, expected a Dataset or DatasetDict of the datasets library")
    if len(found) == 1:
        return {files.TRAIN: next(iter(found.values()))}
    if files.TRAIN not in found:
        raise InputError(f"{given_as}: found the splits {listed(found)}{place}, expected one named train")
    held_out = [name for name in files.HELD_OUT if name in found and len(found[name])]
    return {name: found[name] for name in (files.TRAIN, *held_out)}


def joined(train: Dataset, test: Dataset | None, columns: list[str], given_as: str) -> Dataset:
    """The training samples, then the test samples, if any; InputError if the test set lacks one of `columns`."""
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


def dataset_state(data: Dataset) -> tuple[str, list[tuple[int, int]]]:
    """The library's fingerprint of a data set, and the size and modification time of each of its files.

    The fingerprint alone does not change when a file is replaced, or a generator reads other files.
    """
    states = map(os.stat, sorted(file["filename"] for file in data.cache_files))
    return data._fingerprint, [(state.st_size, state.st_mtime_ns) for state in states]
