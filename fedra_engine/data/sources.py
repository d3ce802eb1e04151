"""Where samples come from: every source yields the same kind of data."""

from __future__ import annotations

from collections.abc import Callable

from fedra_engine.config import DataConfig
from fedra_engine.data.digits import load_digits_source
from fedra_engine.data.domain_data import DomainData
from fedra_engine.data.hub import load_hf_dataset
from fedra_engine.data.image_folder import load_image_folder
from fedra_engine.data.split_lists import load_split_lists
from fedra_engine.data.texts import load_causal_lm, load_text_classification

_SOURCES: dict[str, Callable[[DataConfig, int], DomainData]] = {
    "digits": load_digits_source,
    "image_folder": load_image_folder,
    "domainnet": load_split_lists,
    "nicopp": load_split_lists,
    "hf_dataset": load_hf_dataset,
    "text_classification": load_text_classification,
    "causal_lm": load_causal_lm,
}


def load_source(config: DataConfig, seed: int) -> DomainData:
    """Load the source that `config` names, restricted to its `domains` and `classes`.

    `seed` draws the test set where the source brings none.

    Raises:
        InputError: the source has no such file, domain or column, or samples that cannot be used.
    """
    return _SOURCES[config.source](config, seed)
