"""Put an experiment together: from its configuration to data, clients, model, method and executor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedra_engine.config import ExperimentConfig
from fedra_engine.costs import CostModel
from fedra_engine.data.domain_data import DomainData
from fedra_engine.data.partition import Partition, partition_samples
from fedra_engine.data.prepare import prepare
from fedra_engine.data.preprocessing import preprocessing_for
from fedra_engine.data.samples import Samples
from fedra_engine.data.sources import load_source
from fedra_engine.errors import InputError
from fedra_engine.evaluation import Evaluator
from fedra_engine.execution.executor import Executor
from fedra_engine.execution.fisher import FisherInformation
from fedra_engine.execution.memory import choose_lanes, measure_lane
from fedra_engine.execution.sequential import SequentialExecutor
from fedra_engine.execution.sharding import Sharding
from fedra_engine.execution.sweep import SweepExecutor
from fedra_engine.execution.sweep_model import SweepModel
from fedra_engine.federation.assignment import Assignment
from fedra_engine.federation.clients import Clients, capacities_by_domain, devices_by_domain, ranks_by_domain
from fedra_engine.federation.devices import DeviceRound, Devices, draw_devices
from fedra_engine.federation.sampling import check_sampling, most_participants
from fedra_engine.federation.server_optimizer import ServerOptimizer
from fedra_engine.head_init import initial_heads
from fedra_engine.methods.base import Federation, Method
from fedra_engine.methods.registry import make_method
from fedra_engine.models.adapters import initial_adapters
from fedra_engine.models.batch_arguments import probe_batch_arguments
from fedra_engine.models.foundation import Foundation, make_foundation
from fedra_engine.models.loading import load_pretrained, resolve_model_path
from fedra_engine.models.shards import is_sharded, parameter_count
from fedra_engine.models.state import GlobalState
from fedra_engine.processes import Processes
from fedra_engine.validation import check_method


@dataclass(frozen=True)
class Experiment:
    """Everything the round loop needs.

    `costs` is there where clients have devices, whose time it decides. `samples_made` is `PreparedData.made`.
    """

    domains: list[str]
    train_data: DomainData
    train: Samples
    clients: Clients
    foundation: Foundation
    sweep_model: SweepModel
    method: Method
    server: ServerOptimizer
    executor: Executor
    evaluator: Evaluator
    initial_state: GlobalState
    lanes: int
    samples_made: int | None = None
    costs: CostModel | None = None


def build_experiment(
    config: ExperimentConfig,
    device: torch.device,
    processes: Processes | None = None,
    sharding: Sharding | None = None,
) -> Experiment:
    """Load the data and the model, divide the data among the clients, set up method and executor.

    Args:
        config: of the experiment.
        device: where this process computes.
        processes: of the job; this one alone if not given. All must build the same experiment.
        sharding: how they shard the model; each has all of it if not given.

    Raises:
        InputError: something in the configuration cannot be used.
    """
    check_method(config)
    if config.trace and config.lora.dropout > 0:
        raise InputError(f"trace: found true with lora.dropout {config.lora.dropout}, expected lora.dropout 0")
    if config.trace and config.data.augmentation != "none":
        raise InputError(f"trace: found true with data.augmentation {config.data.augmentation}, expected none")
    processes = Processes.alone() if processes is None else processes
    if sharding is not None:
        sharding.check(config)
    # What one process finds in its files the others must hear of before they come to make passes together.
    with processes.together():
        data = load_source(config.data, config.seed)
    classes = None if data.task == "causal_lm" else len(data.classes)
    with processes.together():
        model = load_pretrained(config.model, classes=classes, sharding=sharding).to(device)
    if (model.main_input_name == "pixel_values") != (data.task == "image_classification"):
        raise InputError(
            f"model.path: found a {model.config.model_type} model, which takes {model.main_input_name}, "
            f"expected one for the {data.task} of data.source {config.data.source}"
        )
    foundation = make_foundation(model, config.lora, classes=classes, block_path=config.model.block_path)
    # Before images are decoded, which may take long; again below, where some of them may turn out unreadable.
    _make_clients(config, data, foundation, processes)
    model_path = resolve_model_path(config.model.path)
    if data.task == "image_classification" and sharding is None:
        _check_image_size(config, model_path, foundation, device)
    with processes.together():
        prepared = prepare(
            data,
            config.data,
            model_path,
            model.config,
            cut_texts=config.lora.dropout == 0 and not config.trace,
        )
    train, test = prepared.train, prepared.test
    costs = CostModel(foundation, train, config.lora, config.training) if config.clients.devices else None
    clients = _make_clients(config, prepared.data, foundation, processes, costs)
    sweep_model = _make_sweep_model(config, foundation, train, device, sharding)
    if config.execution.fused_blocks == "on" and sweep_model.fused == 0:
        raise InputError(
            f"execution.fused_blocks: found on with a {model.config.model_type} model, none of whose blocks can be "
            "fused; expected auto or off"
        )
    fisher = FisherInformation(
        foundation, sweep_model, train, scale=config.lora.scale, seed=config.seed, processes=processes
    )
    method = _make_method(config, foundation, clients, fisher)
    state = method.initial_state(_initial_state(config, foundation, sweep_model, train, device), foundation.base)
    lanes = _choose_lanes(config, foundation, sweep_model, train, len(state.heads), clients)
    return Experiment(
        domains=data.domains,
        train_data=prepared.data.train,
        train=train,
        clients=clients,
        foundation=foundation,
        sweep_model=sweep_model,
        method=method,
        server=ServerOptimizer(config.server, state),
        executor=_make_executor(config, foundation, sweep_model, train, lanes, processes if sharding else None),
        evaluator=Evaluator(foundation, sweep_model, test, config.lora, data.domains, processes),
        initial_state=state,
        lanes=lanes,
        samples_made=prepared.made,
        costs=costs,
    )


def simulate_devices(
    config: ExperimentConfig,
    experiment: Experiment,
    participants: NDArray[np.int64],
    assignment: Assignment,
    round: int,
) -> DeviceRound | None:
    """What becomes of the participants of a round on their devices; None where clients have none."""
    devices = experiment.clients.devices
    if devices is None or experiment.costs is None:
        return None
    costs = experiment.costs.count(experiment.clients, participants, assignment, experiment.method)
    return devices.simulate(participants, costs, round, config.clients.deadline)


def describe(experiment: Experiment) -> dict[str, str]:
    """What a user wants to see before the first round."""
    foundation = experiment.foundation
    size = parameter_count(foundation.model)
    kept = " in shards" if is_sharded(foundation.model) else ""
    targets = ", ".join(target.path for target in foundation.adapter_layout.targets)
    return {
        "model": f"{type(foundation.model).__name__}, {foundation.depth} blocks, {size:,} frozen parameters{kept}",
        "adapters": f"{foundation.adapter_layout.size:,} LoRA parameters a block on {targets}",
        "head": f"{foundation.head_layout.size:,} parameters",
        "clients": f"{len(experiment.clients)} in {len(experiment.domains)} domains",
        "samples": f"{len(experiment.train_data):,} for training{_made(experiment.samples_made)}",
        "lanes": str(experiment.lanes),
        "blocks": f"{experiment.sweep_model.fused} of {foundation.depth} fused",
        "device": str(experiment.initial_state.heads.device),
    }


def _made(samples: int | None) -> str:
    if samples is None:
        return ""
    return f"; {samples:,} preprocessed now" if samples else "; all were in the cache"


def _check_image_size(config: ExperimentConfig, model_path: str, foundation: Foundation, device: torch.device) -> None:
    """Raise InputError unless the model takes images of the size that they will be made in."""
    preprocessing = preprocessing_for(model_path, foundation.model.config, config.data.image_size)
    size = (preprocessing.channels, preprocessing.image_size, preprocessing.image_size)
    black = torch.zeros(size, device=device, dtype=foundation.dtype)
    probe_batch_arguments(foundation.model, foundation.blocks, lambda n: {"pixel_values": black.expand(n, *size)})


def _make_clients(
    config: ExperimentConfig,
    data: DomainData,
    foundation: Foundation,
    processes: Processes,
    costs: CostModel | None = None,
) -> Clients:
    """The clients; where memory decides their capacities, these are one block as long as the `costs` are not known."""
    partition = partition_samples(config.data, data.train, config.seed)
    capacities, ranks = config.clients.capacities, config.clients.ranks
    devices = _make_devices(config, partition)
    rank_of_client = ranks_by_domain(ranks, partition.groups(len(ranks)), config.lora.rank)
    if capacities != "memory":
        blocks = capacities_by_domain(capacities, partition.groups(len(capacities)), foundation.depth)
    elif costs is None or devices is None:
        blocks = np.ones(len(partition.samples), dtype=np.int64)
    else:
        full = np.full(len(partition.samples), config.lora.rank)
        blocks = devices.capacities(costs, full if rank_of_client is None else rank_of_client)
    clients = Clients(partition.samples, partition.domains, blocks, rank_of_client, devices)
    check_sampling(config.clients, clients, processes=processes.count)
    return clients


def _make_devices(config: ExperimentConfig, partition: Partition) -> Devices | None:
    profiles = config.clients.devices
    if not profiles:
        return None
    if config.clients.device_schedule == "drawn":
        return draw_devices(profiles, len(partition.samples), config.seed)
    return devices_by_domain(profiles, partition.groups(len(profiles)), config.seed)


def _make_method(
    config: ExperimentConfig, foundation: Foundation, clients: Clients, fisher: FisherInformation
) -> Method:
    federation = Federation(
        config=config.method,
        clients=clients,
        depth=foundation.depth,
        layout=foundation.adapter_layout,
        scale=config.lora.scale,
        seed=config.seed,
        fisher=fisher,
        deterministic=config.execution.deterministic,
        trains_classifier=foundation.task == "classification",
        capacities_drawn=config.clients.capacity_schedule == "drawn",
    )
    return make_method(federation)


def _make_sweep_model(
    config: ExperimentConfig, foundation: Foundation, train: Samples, device: torch.device, sharding: Sharding | None
) -> SweepModel:
    execution = config.execution
    by_default = device.type != "cpu" and sharding is None
    return SweepModel(
        foundation,
        _examples(train, device, foundation.dtype),
        fuse_blocks=execution.fused_blocks == "on" or (execution.fused_blocks == "auto" and by_default),
        checkpoint_blocks=execution.checkpoint_blocks,
        sharding=sharding,
    )


def _choose_lanes(
    config: ExperimentConfig,
    foundation: Foundation,
    sweep_model: SweepModel,
    train: Samples,
    heads: int,
    clients: Clients,
) -> int:
    if config.execution.executor == "sequential":
        return 1
    memory = measure_lane(foundation, sweep_model, train, config.lora, config.training, heads)
    participants = most_participants(config.clients, clients)
    return choose_lanes(config.execution.lanes, memory, foundation.head.weight.device, participants)


def _make_executor(
    config: ExperimentConfig,
    foundation: Foundation,
    sweep_model: SweepModel,
    train: Samples,
    lanes: int,
    sharded_over: Processes | None,
) -> Executor:
    if config.execution.executor == "sequential":
        return SequentialExecutor(foundation, train, config.lora)
    return SweepExecutor(foundation, sweep_model, train, config.lora, lanes=lanes, sharded_over=sharded_over)


def _initial_state(
    config: ExperimentConfig, foundation: Foundation, model: SweepModel, train: Samples, device: torch.device
) -> GlobalState:
    dtype = foundation.adapter_dtype
    adapters = initial_adapters(foundation.adapter_layout, foundation.depth, seed=config.seed, dtype=dtype)
    heads = initial_heads(config.model, foundation, model, train, seed=config.seed)
    return GlobalState(adapters.to(device), heads)


def _examples(samples: Samples, device: torch.device, dtype: torch.dtype) -> Callable[[int], dict[str, Tensor]]:
    # The same sample again and again will do: only shapes are looked at.
    return lambda count: samples.inputs(torch.zeros(count, dtype=torch.int64), device, dtype)
