"""Data and model passed from Python in place of those that the configuration names."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from fedra_engine.config import ExperimentConfig, register_choice
from fedra_engine.config.options import IN_MEMORY
from fedra_engine.config.values import plain_copy
from fedra_engine.data.domain_data import DomainData, with_validation
from fedra_engine.data.partition import Partition, partition_by, partition_samples
from fedra_engine.data.sources import dataset_source, load_source
from fedra_engine.models.loading import adopt_model, load_pretrained, resolve_model_path
from fedra_engine.models.sharding import Sharding
from fedra_engine.runtime.errors import InputError


@dataclass(frozen=True)
class Inputs:
    """Objects passed from Python; None where the configuration decides.

    Attributes:
        data: data that a source has loaded.
        dataset: a `datasets.Dataset` or `DatasetDict`.
        model: a torch model.
        processor: the model's image processor or tokenizer, of transformers.
        partitioner: a partitioner of flwr-datasets.
    """

    data: DomainData | None = None
    dataset: Any = None
    model: Any = None
    processor: Any = None
    partitioner: Any = None

    def __post_init__(self) -> None:
        if self.partitioner is not None:
            register_choice("data.partition", IN_MEMORY)

    def described(self, config: ExperimentConfig | None) -> ExperimentConfig:
        """A copy of `config` (the embedded experiment if not given) with `IN_MEMORY` in the fields of these inputs.

        Raises:
            InputError: `config` is something else, or lacks its partitioner in memory.
        """
        if config is not None and not isinstance(config, ExperimentConfig):
            raise InputError(f"config: found {config!r}, expected an ExperimentConfig")
        config = plain_copy(config or ExperimentConfig())
        if self.dataset is not None:
            known = config.data.source in ("text_classification", "causal_lm")
            source = config.data.source if known else "hf_dataset"
            config = replace(config, data=replace(config.data, source=source, root=IN_MEMORY))
        if self.model is not None:
            config = replace(config, model=replace(config.model, path=IN_MEMORY))
        if self.partitioner is not None:
            config = replace(config, data=replace(config.data, partition=IN_MEMORY))
        elif config.data.partition == IN_MEMORY:
            raise InputError("data.partition: found a partitioner in memory, expected it to be handed over again")
        return config

    def load_data(self, config: ExperimentConfig) -> DomainData:
        """The data passed from Python, or else those of `config.data`; with a validation set if it asks for one."""
        seed = config.seed if config.data.split_seed is None else config.data.split_seed
        if self.data is not None:
            data = self.data
        elif self.dataset is not None:
            data = dataset_source(self.dataset, config.data, seed)
        elif config.data.root == IN_MEMORY:
            raise InputError("data.root: found a run on a data set in memory, expected it to be handed over again")
        else:
            data = load_source(config.data, seed)
        return with_validation(data, config.data, seed)

    def load_model(
        self, config: ExperimentConfig, classes: int | None, device: torch.device, sharding: Sharding | None
    ) -> Any:
        """Copy the model passed from Python, or load that of `config.model`, to `device`."""
        if self.model is not None:
            if sharding is not None:
                raise InputError("model: found a model in memory in a job that shards models, expected a model.path")
            return adopt_model(self.model, config.model).to(device)
        if config.model.path == IN_MEMORY:
            raise InputError("model.path: found a run of a model in memory, expected it to be handed over again")
        return load_pretrained(config.model, classes=classes, sharding=sharding, device=device)

    def model_path(self, config: ExperimentConfig) -> str | None:
        """Path or hub name of the model, for its processor; None if it was passed from Python."""
        return None if self.model is not None else resolve_model_path(config.model.path)

    def divide(self, config: ExperimentConfig, train: DomainData) -> Partition:
        """Divide the training samples by the partitioner passed from Python, or else as `config.data` says."""
        if self.partitioner is not None:
            return partition_by(self.partitioner)(config.data, train, config.seed)
        return partition_samples(config.data, train, config.seed)
