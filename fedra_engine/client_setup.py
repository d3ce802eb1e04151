"""Make the clients of an experiment: their samples, capacities, ranks and devices."""

from __future__ import annotations

import numpy as np

from fedra_engine.config import ExperimentConfig
from fedra_engine.costs.device_times import capacities_by_memory
from fedra_engine.costs.memory_model import CostModel
from fedra_engine.data.domain_data import DomainData
from fedra_engine.data.partition import Partition, partition_samples
from fedra_engine.federation.clients import (
    Clients,
    Devices,
    capacities_by_domain,
    check_sampling,
    devices_by_domain,
    draw_devices,
    ranks_by_domain,
)


def make_clients(
    config: ExperimentConfig, train: DomainData, depth: int, *, processes: int, costs: CostModel | None = None
) -> Clients:
    """Divide the training samples among clients of a model of `depth` blocks that `processes` processes train.

    Where memory decides the capacities, each is one block until the `costs` are known.

    Raises:
        InputError: the clients that the configuration asks for cannot be made of these samples or this model.
    """
    partition = partition_samples(config.data, train, config.seed)
    count = len(partition.samples)
    capacities, ranks = config.clients.capacities, config.clients.ranks
    devices = _make_devices(config, partition)
    rank_of_client = ranks_by_domain(ranks, partition.groups(len(ranks)), config.lora.rank)
    if capacities != "memory":
        blocks = capacities_by_domain(capacities, partition.groups(len(capacities)), depth)
    elif costs is None or devices is None:
        blocks = np.ones(count, dtype=np.int64)
    else:
        full = np.full(count, config.lora.rank)
        blocks = capacities_by_memory(devices, costs, full if rank_of_client is None else rank_of_client)
    clients = Clients(partition.samples, partition.domains, blocks, rank_of_client, devices, partition.sizes)
    check_sampling(config.clients, clients, processes=processes)
    return clients


def _make_devices(config: ExperimentConfig, partition: Partition) -> Devices | None:
    profiles = config.clients.devices
    if not profiles:
        return None
    if config.clients.device_schedule == "drawn":
        return draw_devices(profiles, len(partition.samples), config.seed)
    return devices_by_domain(profiles, partition.groups(len(profiles)), config.seed)
