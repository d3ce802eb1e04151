"""Data sets of the `datasets` library: saved with `save_to_disk`, on the hub, or handed over in memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from fedra_engine.config import DataConfig
from fedra_engine.data.domain_data import listed
from fedra_engine.data.sources.files import HELD_OUT, SUFFIXES, TRAIN, check_encoding
from fedra_engine.runtime.errors import InputError, one_line

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict


def is_saved_dataset(folder: Path) -> bool:
    """Whether `folder` was made by `save_to_disk`."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "dataset_info.json"))


def open_dataset(config: DataConfig) -> dict[str, Dataset]:
    """The splits of the data set that `config.root` names; see `splits_of`."""
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


def splits_of(found: Dataset | DatasetDict, given_as: str, place: str = "") -> dict[str, Dataset]:
    """The training split of a data set, then those of `HELD_OUT` that have samples.

    Raises:
        InputError: it is none, or has several splits and none of them is `train`.
    """
    from datasets import Dataset, DatasetDict

    if isinstance(found, Dataset):
        return {TRAIN: found}
    if not isinstance(found, DatasetDict):
        kind = type(found).__name__
        raise InputError(f"{given_as}: found a {kind}, expected a Dataset or DatasetDict of the datasets library")
    if len(found) == 1:
        return {TRAIN: next(iter(found.values()))}
    if TRAIN not in found:
        raise InputError(f"{given_as}: found the splits {listed(found)}{place}, expected one named train")
    return {TRAIN: found[TRAIN], **{name: found[name] for name in HELD_OUT if name in found and len(found[name])}}


def joined(train: Dataset, test: Dataset | None, columns: list[str], given_as: str) -> Dataset:
    """The training samples, then those of the test set, if there is one.

    Raises:
        InputError: the test set lacks one of `columns`, or has it in another type.
    """
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


def state_of(data: Dataset) -> tuple[str, list[tuple[int, int]]]:
    """The library's fingerprint of a data set, and size in bytes and time of the last change of each of its files.

    The fingerprint alone stays the same where a generator finds other files, or one of these files is replaced.
    """
    states = map(os.stat, sorted(file["filename"] for file in data.cache_files))
    return data._fingerprint, [(state.st_size, state.st_mtime_ns) for state in states]
