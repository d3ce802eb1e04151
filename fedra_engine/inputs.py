"""What is handed over from Python instead of being loaded as the configuration says."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from fedra_engine.config import ExperimentConfig, register_choice
from fedra_engine.data.domain_data import DomainData
from fedra_engine.data.partition import Partition, partition_by, partition_samples
from fedra_engine.data.sources import dataset_source, load_source
from fedra_engine.models.loading import adopt_model, load_pretrained, resolve_model_path
from fedra_engine.models.sharding import Sharding
from fedra_engine.runtime.errors import InputError

IN_MEMORY = "in-memory"
"""Where data, model and partition are in a configuration that names none of them."""


@dataclass(frozen=True)
class Inputs:
    """What is handed over instead of being loaded as the configuration says; None where nothing is.

    Attributes:
        data: what a source gave.
        dataset: a `datasets.Dataset` or `DatasetDict`, as the source `hf_dataset` takes them.
        model: a torch model.
        processor: an image processor or tokenizer of transformers, for the model.
        partitioner: of flwr-datasets.
    """

    data: DomainData | None = None
    dataset: Any = None
    model: Any = None
    processor: Any = None
    partitioner: Any = None

    def __post_init__(self) -> None:
        """Let a configuration say that its partitioner is handed over."""
        if self.partitioner is not None:
            register_choice("data.partition", IN_MEMORY)

    def described_in(self, config: ExperimentConfig) -> ExperimentConfig:
        """`config` with what is handed over in the fields that say where data, model and partition are from.

        Raises:
            InputError: it is of a run with a partitioner that is not handed over.
        """
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
        """The data that were handed over, or else those of `config.data`."""
        if self.data is not None:
            return self.data
        if self.dataset is not None:
            return dataset_source(self.dataset, config.data, config.seed)
        if config.data.root == IN_MEMORY:
            raise InputError("data.root: found a run on a data set in memory, expected it to be handed over again")
        return load_source(config.data, config.seed)

    def load_model(
        self, config: ExperimentConfig, classes: int | None, device: torch.device, sharding: Sharding | None
    ) -> Any:
        """The model that was handed over, copied, or else that of `config.model`; on `device`."""
        if self.model is not None:
            if sharding is not None:
                raise InputError("model: found a model in memory in a job that shards models, expected a model.path")
            return adopt_model(self.model, config.model).to(device)
        if config.model.path == IN_MEMORY:
            raise InputError("model.path: found a run of a model in memory, expected it to be handed over again")
        return load_pretrained(config.model, classes=classes, sharding=sharding).to(device)

    def model_path(self, config: ExperimentConfig) -> str | None:
        """Where the processor of the model is; None if the model was handed over."""
        return None if self.model is not None else resolve_model_path(config.model.path)

    def divide(self, config: ExperimentConfig, train: DomainData) -> Partition:
        """Divide the training samples as the partitioner that was handed over does, or else as `config.data` says."""
        if self.partitioner is not None:
            return partition_by(self.partitioner)(config.data, train, config.seed)
        return partition_samples(config.data, train, config.seed)
