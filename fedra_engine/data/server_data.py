"""Unlabelled samples of the server's own: any images in a folder, or the texts in a file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedra_engine.config import DataConfig
from fedra_engine.data.domain_data import DataTask, DomainData, is_missing
from fedra_engine.data.images import image_column, image_suffixes
from fedra_engine.data.sources.files import read_table
from fedra_engine.runtime.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

_OPTION = "method.stand_in_data"


def load_unlabelled(path: Path, domains: list[str], task: DataTask, config: DataConfig) -> DomainData:
    """All images below a folder, or all texts of a csv, tsv, jsonl, txt or parquet file, as samples of one domain.

    Args:
        path: of the folder or file.
        domains: of the training data, for messages.
        task: whether images or texts are wanted.
        config: the column of texts (`columns.input`, by default `text`), and the encoding.

    Raises:
        InputError: there is nothing of that kind.
    """
    content = _images(path, domains) if task == "image_classification" else _texts(path, task, domains, config)
    count = len(content)
    return DomainData(
        task=task,
        content=content,
        domain_of=np.zeros(count, dtype=np.int64),
        domains=["server"],
        labels=None if task == "causal_lm" else np.zeros(count, dtype=np.int64),
        classes=["unknown"],
        is_test=np.zeros(count, dtype=np.bool_),
        given_as=_OPTION,
    )


def _images(folder: Path, domains: list[str]) -> Dataset:
    paths = [
        str(path)
        for path in folder.rglob("*")
        if path.suffix.lower() in image_suffixes() and "/." not in f"/{path.relative_to(folder)}"
    ]
    if not paths:
        raise InputError(f"{_OPTION}: found no images below {str(folder)!r}, expected {_expected(domains, 'folder')}")
    return image_column(sorted(paths))


def _texts(file: Path, task: DataTask, domains: list[str], config: DataConfig) -> Dataset:
    from datasets import Dataset

    if not file.is_file():
        raise InputError(f"{_OPTION}: found no file {str(file)!r}, expected {_expected(domains, 'file')}")
    # A txt file has this column alone.
    column = "text" if file.suffix.lower() == ".txt" else config.columns.input or "text"
    try:
        values = [row.get(column) for _, row in read_table(file, config.encoding)]
    except InputError as error:
        raise InputError(re.sub(r"^data\.root", _OPTION, str(error))) from error
    except UnicodeError as error:
        raise InputError(
            f"{_OPTION}: found no {config.encoding} text in {file}, expected it as data.encoding"
        ) from error
    texts = [str(value) for value in values if not is_missing(value)]
    if not texts:
        raise InputError(f"{_OPTION}: found no texts in column {column!r} of {file}, expected some")
    if task == "causal_lm":
        return Dataset.from_dict({"prompt": [""] * len(texts), "response": texts})
    return Dataset.from_dict({"text": texts})


def _expected(domains: list[str], kind: str) -> str:
    return f"one of the domains {', '.join(domains)}, or a {kind} of the server's own"
