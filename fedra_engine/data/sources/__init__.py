"""Where samples come from: one file a source, and every source yields the same kind of data."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from fedra_engine.config import DataConfig
from fedra_engine.data.domain_data import DomainData
from fedra_engine.data.names import registering
from fedra_engine.data.sources.digits import load_digits_source
from fedra_engine.data.sources.hub import labelled_samples, load_hf_dataset, splits_of
from fedra_engine.data.sources.image_folder import load_image_folder
from fedra_engine.data.sources.split_lists import load_split_lists
from fedra_engine.data.sources.texts import causal_lm_samples, load_causal_lm, load_text_classification

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

Source = Callable[[DataConfig, int], DomainData]
"""Loads the samples that a configuration names; the experiment's seed draws a test set where they have none."""

SOURCES: dict[str, Source] = {
    "digits": load_digits_source,
    "image_folder": load_image_folder,
    "domainnet": load_split_lists,
    "nicopp": load_split_lists,
    "hf_dataset": load_hf_dataset,
    "text_classification": load_text_classification,
    "causal_lm": load_causal_lm,
}


def register_source(name: str) -> Callable[[Source], Source]:
    """A decorator that makes a function the source `name`; `prepare_source` does what all sources do in the end.

    Raises:
        InputError: the name is taken.
    """
    return registering(SOURCES, name, "register_source", "data.source")


def load_source(config: DataConfig, seed: int) -> DomainData:
    """Load the source that `config` names, restricted to its `domains` and `classes`.

    `seed` draws the test set where the source brings none.

    Raises:
        InputError: the source has no such file, domain or column, or samples that cannot be used.
    """
    return SOURCES[config.source](config, seed)


def dataset_source(dataset: Dataset | DatasetDict, config: DataConfig, seed: int) -> DomainData:
    """The samples of a data set in memory, restricted to the `domains` and `classes` of `config`.

    They are images or texts with labels, as of the source `hf_dataset`; where `config.source` is `causal_lm`, its
    texts.

    Raises:
        InputError: the data set has no training split or column, or samples that cannot be used.
    """
    samples = causal_lm_samples if config.source == "causal_lm" else labelled_samples
    return samples(*splits_of(dataset, "dataset"), config, seed, "dataset")
