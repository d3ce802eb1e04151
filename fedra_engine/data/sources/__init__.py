"""The registry of data sources, all of which yield `DomainData`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from fedra_engine.config import DataConfig
from fedra_engine.config.options import registering
from fedra_engine.data.domain_data import DomainData
from fedra_engine.data.sources.data_sets import splits_of
from fedra_engine.data.sources.digits import load_digits_source
from fedra_engine.data.sources.image_files import load_image_folder, load_split_lists
from fedra_engine.data.sources.tables import dataset_samples, load_tables

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

Source = Callable[[DataConfig, int], DomainData]
"""Loads the samples that a configuration names; the seed draws a test set if they have none. Raises InputError."""

SOURCES: dict[str, Source] = {
    "digits": load_digits_source,
    "image_folder": load_image_folder,
    "domainnet": load_split_lists,
    "nicopp": load_split_lists,
    "hf_dataset": load_tables,
    "text_classification": load_tables,
    "causal_lm": load_tables,
}


def register_source(name: str) -> Callable[[Source], Source]:
    """A decorator that registers a function, which should end with `prepare_source`, as the source `name`.

    Raises InputError if the name is taken.
    """
    return registering(SOURCES, "data.source", name)


def load_source(config: DataConfig, seed: int) -> DomainData:
    """The samples that `config` names, restricted to its `domains` and `classes`; `seed` draws a missing test set.

    Raises:
        InputError: a file, domain or column is missing, or a sample cannot be used.
    """
    return SOURCES[config.source](config, seed)


def dataset_source(dataset: Dataset | DatasetDict, config: DataConfig, seed: int) -> DomainData:
    """The same for a data set in memory: unlabelled texts if `config.source` is `causal_lm`, else labelled samples.

    Raises:
        InputError: the training split or a column is missing, or a sample cannot be used.
    """
    return dataset_samples(splits_of(dataset, "dataset"), config, seed, "dataset")
