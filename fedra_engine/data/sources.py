"""Where samples come from: every source yields the same two datasets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedra_engine.config import DataConfig
from fedra_engine.data.digits import load_digits_domains
from fedra_engine.data.image_folder import load_image_folder
from fedra_engine.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class DomainData:
    """A federated data source before preprocessing.

    Args:
        train: samples to divide among the clients, features `image`, `label` and `domain`.
        test: held-out samples with the same features.
    """

    train: Dataset
    test: Dataset

    @property
    def classes(self) -> list[str]:
        """Names of the classes, indexed by `label`."""
        return list(self.train.features["label"].names)

    @property
    def domains(self) -> list[str]:
        """Names of the domains, indexed by `domain`; client capacities follow this order."""
        return list(self.train.features["domain"].names)


def load_source(config: DataConfig, seed: int) -> DomainData:
    """Load the source that `config` names, restricted to its `domains`.

    `seed` draws the test set where the source brings none.

    Raises:
        InputError: the source has no such folder, domain or image.
    """
    if config.source == "image_folder":
        return DomainData(*load_image_folder(config, seed))
    train, test = load_digits_domains()
    if not config.domains:
        return DomainData(train, test)
    return DomainData(select_domains(train, config.domains), select_domains(test, config.domains))


def select_domains(data: Dataset, domains: Sequence[str]) -> Dataset:
    """The samples of `domains`, with domain indices in that order.

    Raises:
        InputError: a domain the data does not have.
    """
    from datasets import ClassLabel

    names = data.features["domain"].names
    unknown = [domain for domain in domains if domain not in names]
    if unknown:
        raise InputError(f"data.domains: found {unknown[0]!r}, expected some of {', '.join(names)}")
    index_of = np.full(len(names), -1)
    index_of[[names.index(domain) for domain in domains]] = np.arange(len(domains))
    indices = index_of[np.asarray(data["domain"])]
    rows = np.flatnonzero(indices >= 0)
    selected = data.select(rows).remove_columns("domain")
    return selected.add_column("domain", indices[rows], feature=ClassLabel(names=list(domains)))
