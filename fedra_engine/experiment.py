"""Put an experiment together: from its configuration to data, clients, model, method and executor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fedra_engine.config import ExperimentConfig
from fedra_engine.data.domain_data import DomainData
from fedra_engine.data.partition import partition_samples
from fedra_engine.data.prepare import prepare
from fedra_engine.data.samples import Samples
from fedra_engine.data.sources import load_source
from fedra_engine.errors import InputError
from fedra_engine.evaluation import Evaluator
from fedra_engine.execution.executor import Executor
from fedra_engine.execution.fisher import FisherInformation
from fedra_engine.execution.sequential import SequentialExecutor
from fedra_engine.execution.sweep import SweepExecutor
from fedra_engine.execution.sweep_model import SweepModel
from fedra_engine.federation.clients import Clients, capacities_by_domain, ranks_by_domain
from fedra_engine.federation.sampling import check_sampling
from fedra_engine.federation.server_optimizer import ServerOptimizer
from fedra_engine.head_init import initial_heads
from fedra_engine.methods.base import Federation, Method
from fedra_engine.methods.registry import make_method
from fedra_engine.models.adapters import initial_adapters
from fedra_engine.models.foundation import Foundation, make_foundation
from fedra_engine.models.loading import load_pretrained, resolve_model_path
from fedra_engine.models.state import GlobalState


@dataclass(frozen=True)
class Experiment:
    """Everything the round loop needs."""

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


def build_experiment(config: ExperimentConfig, device: torch.device) -> Experiment:
    """Load the data and the model, divide the data among the clients, set up method and executor.

    Raises:
        InputError: something in the configuration cannot be used.
    """
    if config.trace and config.lora.dropout > 0:
        raise InputError(f"trace: found true with lora.dropout {config.lora.dropout}, expected lora.dropout 0")
    data = load_source(config.data, config.seed)
    model = load_pretrained(config.model, classes=None if data.task == "causal_lm" else len(data.classes)).to(device)
    if (model.main_input_name == "pixel_values") != (data.task == "image_classification"):
        raise InputError(
            f"model.path: found a {model.config.model_type} model, which takes {model.main_input_name}, "
            f"expected one for the {data.task} of data.source {config.data.source}"
        )
    classes = None if data.task == "causal_lm" else len(data.classes)
    foundation = make_foundation(model, config.lora, classes=classes, block_path=config.model.block_path)
    # Before images are decoded, which may take long; again below, where some of them may turn out unreadable.
    _make_clients(config, data, foundation.depth)
    prepared = prepare(
        data,
        config.data,
        resolve_model_path(config.model.path),
        model.config,
        cut_texts=config.lora.dropout == 0 and not config.trace,
    )
    clients = _make_clients(config, prepared.data, foundation.depth)
    train, test = prepared.train, prepared.test
    fuse = config.execution.fused_blocks == "on" or (config.execution.fused_blocks == "auto" and device.type != "cpu")
    sweep_model = SweepModel(foundation, _examples(train, device, foundation.dtype), fuse_blocks=fuse)
    if config.execution.fused_blocks == "on" and sweep_model.fused == 0:
        raise InputError(
            f"execution.fused_blocks: found on with a {model.config.model_type} model, none of whose blocks can be "
            "fused; expected auto or off"
        )
    fisher = FisherInformation(foundation, sweep_model, train, scale=config.lora.scale, seed=config.seed)
    method = _make_method(config, foundation, clients, fisher)
    state = method.initial_state(_initial_state(config, foundation, sweep_model, train, device), foundation.base)
    return Experiment(
        domains=data.domains,
        train_data=prepared.data.train,
        train=train,
        clients=clients,
        foundation=foundation,
        sweep_model=sweep_model,
        method=method,
        server=ServerOptimizer(config.server, state),
        executor=_make_executor(config, foundation, sweep_model, train),
        evaluator=Evaluator(foundation, sweep_model, test, config.lora, data.domains),
        initial_state=state,
    )


def describe(experiment: Experiment) -> dict[str, str]:
    """What a user wants to see before the first round."""
    foundation = experiment.foundation
    size = sum(parameter.numel() for parameter in foundation.model.parameters())
    targets = ", ".join(target.path for target in foundation.adapter_layout.targets)
    return {
        "model": f"{type(foundation.model).__name__}, {foundation.depth} blocks, {size:,} frozen parameters",
        "adapters": f"{foundation.adapter_layout.size:,} LoRA parameters a block on {targets}",
        "head": f"{foundation.head_layout.size:,} parameters",
        "clients": f"{len(experiment.clients)} in {len(experiment.domains)} domains",
        "samples": f"{len(experiment.train_data):,} for training",
        "blocks": f"{experiment.sweep_model.fused} of {foundation.depth} fused",
        "device": str(experiment.initial_state.heads.device),
    }


def _make_clients(config: ExperimentConfig, data: DomainData, depth: int) -> Clients:
    partition = partition_samples(config.data, data.train, config.seed)
    capacities, ranks = config.clients.capacities, config.clients.ranks
    clients = Clients(
        partition.samples,
        partition.domains,
        capacities_by_domain(capacities, partition.groups(len(capacities)), depth),
        ranks_by_domain(ranks, partition.groups(len(ranks)), config.lora.rank),
    )
    check_sampling(config.clients, clients)
    return clients


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


def _make_executor(
    config: ExperimentConfig, foundation: Foundation, sweep_model: SweepModel, train: Samples
) -> Executor:
    if config.execution.executor == "sequential":
        return SequentialExecutor(foundation, train, config.lora)
    return SweepExecutor(foundation, sweep_model, train, config.lora, lanes=config.execution.lanes)


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
