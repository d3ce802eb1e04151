"""The samples that the server may use: some of the clients', or any images in a folder, or the texts in a file."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedra_engine.config import DataConfig, ExperimentConfig
from fedra_engine.data.domain_data import DataTask, DomainData, is_missing
from fedra_engine.data.images import image_column, image_suffixes
from fedra_engine.data.samples import PreparedData, Samples, prepare
from fedra_engine.data.sources.files import read_table
from fedra_engine.runtime.errors import InputError
from fedra_engine.runtime.randomness import generator
from fedra_engine.runtime.stages import Stage

if TYPE_CHECKING:
    from datasets import Dataset

_OPTION = "method.stand_in_data"


def server_samples(
    config: ExperimentConfig, prepared: PreparedData, model_path: str | None, model_config: Any, processor: Any
) -> tuple[Samples, NDArray[np.int64]]:
    """The samples that stand-ins are fitted to, and the rows of those that may be drawn, int64 [rows].

    Args:
        config: whose `method.stand_in_data` names a domain of the clients, or a folder or file of the server's own;
            without it, the samples of all clients may be drawn.
        prepared: the clients' data.
        model_path: of the model, as in `prepare`.
        model_config: the model's transformers configuration.
        processor: the model's image processor or tokenizer; default: the one at `model_path`.

    Raises:
        InputError: the server's samples cannot be used.
    """
    data, samples, wanted = prepared.data, prepared.train, config.method.stand_in_data
    if wanted in data.domains:
        return samples, np.flatnonzero(samples.domains.numpy() == data.domains.index(wanted))
    if wanted is not None:
        with Stage("reading the server's samples"):
            own = load_unlabelled(Path(wanted), data.domains, data.task, config.data)
            # The others need not be decoded.
            chosen = generator(config.seed, purpose="samples of the server").permutation(len(own))
            own = own.select(np.sort(chosen[: config.method.stand_in_samples]))
            plain = replace(config.data, augmentation="none")
            samples = prepare(own, plain, model_path, model_config, processor).train
    return samples, np.arange(len(samples.domains))


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
