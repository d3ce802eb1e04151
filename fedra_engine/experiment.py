"""Build an experiment from its configuration: data, clients, model, method and executor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from fedra_engine.config import ExperimentConfig, TrainingConfig
from fedra_engine.config.validation import validate
from fedra_engine.costs.device_times import DeviceRound, capacities_by_memory, simulate_round
from fedra_engine.costs.model import ClientCosts, CostModel
from fedra_engine.data.domain_data import DomainData
from fedra_engine.data.partition import Partition
from fedra_engine.data.preprocessing import Preprocessing, preprocessing_for
from fedra_engine.data.samples import PreparedData, Samples, prepare
from fedra_engine.data.server_data import server_samples
from fedra_engine.data.tokenization import Tokenization
from fedra_engine.execution.evaluation import Evaluator, FisherInformation
from fedra_engine.execution.executor import Executor, make_executor, make_sweep_model
from fedra_engine.execution.head_init import initial_heads
from fedra_engine.execution.image_size import check_image_size, warn_of_slow_images
from fedra_engine.execution.measured_choices import choose_attention, choose_dtype
from fedra_engine.execution.scheduling import WorkDivision
from fedra_engine.execution.stand_ins import StandInFit
from fedra_engine.execution.sweep_model import SweepModel
from fedra_engine.federation.assignment import Assignment
from fedra_engine.federation.clients import (
    Clients,
    capacities_by_domain,
    check_sampling,
    devices_by_domain,
    draw_devices,
    most_participants,
    ranks_by_domain,
    sample_participants,
)
from fedra_engine.federation.server_optimizer import ServerOptimizer
from fedra_engine.federation.work import LocalWork, learning_rate, with_step_limit
from fedra_engine.inputs import Inputs
from fedra_engine.methods.base import Federation, Method
from fedra_engine.methods.registry import make_method
from fedra_engine.models.adapters import initial_adapters
from fedra_engine.models.foundation import Foundation, make_foundation
from fedra_engine.models.sharding import Sharding, is_sharded
from fedra_engine.models.state import GlobalState
from fedra_engine.runtime.errors import InputError, count_of, first_few
from fedra_engine.runtime.processes import Processes
from fedra_engine.runtime.stages import Stage

_MOST_NAMED = 10
"""Most clients that a message names."""


@dataclass(frozen=True)
class Experiment:
    """Everything the round loop needs.

    Attributes:
        domains: names of the domains.
        train_data: the training samples as the source gave them.
        train_samples, test_samples: the preprocessed samples.
        foundation: the frozen model.
        sweep_model: the same model, ready for many clients at once.
        initial_state: the global state before the first round.
        division: divides the participants among the processes.
        training: `config.training` with `even_steps` turned into a limit of steps.
        stand_in_fit: fits the stand-ins for blocks that clients do not hold; None if they have none.
        newly_cached, processing: see `PreparedData`.
        choices: the precision and the attention, in words, each with the reason if it was `auto`; `config` has what was
            chosen.
    """

    config: ExperimentConfig
    domains: list[str]
    train_data: DomainData
    train_samples: Samples
    test_samples: Samples
    clients: Clients
    foundation: Foundation
    sweep_model: SweepModel
    method: Method
    server: ServerOptimizer
    executor: Executor
    evaluator: Evaluator
    initial_state: GlobalState
    processes: Processes
    division: WorkDivision
    training: TrainingConfig
    stand_in_fit: StandInFit | None
    newly_cached: int | None
    processing: Preprocessing | Tokenization
    choices: Mapping[str, str]

    def __repr__(self) -> str:
        plan = f"{self.config.method.name}, {count_of(self.config.rounds, 'round')}"
        people = f"{count_of(len(self.clients), 'client')} in {count_of(len(self.domains), 'domain')}"
        return f"Experiment({plan}, {people}, {type(self.foundation.model).__name__})"

    @cached_property
    def cost_model(self) -> CostModel:
        """Counts the clients' costs; made at the first use, as it measures the blocks."""
        return CostModel(self.foundation, self.train_samples, self.config.lora, self.config.training)

    def costs(self, round: int = 0) -> ClientCosts:
        """Count the costs of the participants of `round`; all fields are [participants]."""
        return self.costs_of(*self.assigned_work(round))

    def costs_of(self, work: LocalWork, assignment: Assignment) -> ClientCosts:
        """Count the costs of the participants of `work` under an `assignment`; all fields are [participants]."""
        return self.cost_model.count(self.clients, work.participants, assignment, self.method)

    def round_work(self, round: int) -> tuple[LocalWork, Assignment, DeviceRound | None]:
        """As `assigned_work`, of the participants whose updates arrive; and the round on their devices, if any."""
        work, assignment = self.assigned_work(round)
        devices = self.clients.devices
        if devices is None:
            return work, assignment, None
        costs = self.costs_of(work, assignment)
        simulated = simulate_round(devices, work.participants, costs, round, self.config.clients.deadline)
        arrived = np.flatnonzero(simulated.arrived)
        return replace(work, participants=work.participants[arrived]), assignment.select(arrived), simulated

    def group_name(self, index: int) -> str:
        """The domain of the clients in group `index`, or the number where groups mix the data's domains (`iid`)."""
        return self.domains[index] if len(self.domains) > int(self.clients.domains.max()) else str(index)

    def name_clients(self, clients: NDArray[np.int64]) -> str:
        """Name clients and their domains, as in `client 3 (sketch)`; of many, only the first ones."""
        named = [f"{client} ({self.group_name(int(self.clients.domains[client]))})" for client in clients]
        return f"client{'s' if len(clients) > 1 else ''} {first_few(named, _MOST_NAMED)}"

    def more_than_exported(self, state: GlobalState) -> str | None:
        """Describe the model that is evaluated if it is more than the exported global model; else None."""
        if self.method.personal_states(state) is not None:
            return (
                "the clients' own models, each on its domain and with the factors that it keeps to itself "
                "(private.safetensors)"
            )
        exits = self.method.evaluated_model().exits
        blocks = ", ".join(str(exit + 1) for exit in exits)
        return f"the mean of the logits after blocks {blocks} (exits.safetensors)" if len(exits) > 1 else None

    def with_fresh_stand_ins(self, state: GlobalState, round: int, assignment: Assignment) -> GlobalState:
        """The `state` before `round`, with stand-ins if the `assignment` needs any, and new ones if they are due.

        The first are fitted to the frozen model, later ones to `state`. All processes call this together.
        """
        fit = self.stand_in_fit
        if fit is None or not assignment.replaced_blocks.any() or not (state.stand_ins is None or fit.is_due(round)):
            return state
        stand_ins = fit(self.initial_state if state.stand_ins is None else state, round)
        # Equal sums give equal maps, to the last bit only on equal hardware.
        self.processes.broadcast_(list(stand_ins))
        return replace(state, stand_ins=stand_ins)

    def assign(self, participants: NDArray[np.int64], round: int) -> Assignment:
        """What the method asks of `participants` in `round`, with stand-ins for missing blocks, if there are any."""
        assignment = self.method.assign(participants, round).training_only(self.foundation.adapted)
        if self.stand_in_fit is None:
            return assignment
        return assignment.with_stand_ins(self.method.evaluated_model().blocks)

    def assigned_work(self, round: int) -> tuple[LocalWork, Assignment]:
        """What a round's participants are asked to train, without those that hold or train nothing."""
        config = self.config
        participants = sample_participants(config.clients, self.clients, seed=config.seed, round=round)
        assignment = self.assign(participants, round)
        training = assignment.held if self.foundation.head_layout.size else assignment.trained_blocks
        holders = np.flatnonzero(training.any(axis=1))
        lr = learning_rate(config.training, round, config.rounds)
        work = LocalWork(self.clients, participants[holders], self.training, config.seed, round, lr)
        return work, assignment.select(holders)


def build_experiment(
    config: ExperimentConfig,
    device: torch.device,
    processes: Processes | None = None,
    sharding: Sharding | None = None,
    inputs: Inputs | None = None,
) -> Experiment:
    """Load the data and the model, divide the data among the clients, and set up method and executor.

    Args:
        device: of this process.
        processes: of the job, which must all build the same experiment; this one alone if not given.
        sharding: how the processes shard the model; each holds all of it if not given.
        inputs: data and model in place of those that `config` names.

    Raises:
        InputError: something in the configuration cannot be used.
    """
    processes, inputs = processes or Processes.alone(), inputs or Inputs()
    config, precision = choose_dtype(config, device, processes)
    data, foundation = _load(config, device, processes, sharding, inputs)
    # A check alone, before images are decoded, which may take long: without `costs`, capacities by memory are unknown.
    partition = inputs.divide(config, data.train)
    make_clients(config, partition, data.domains, foundation.depth, processes=processes.count)
    prepared = _prepare(config, data, foundation, processes, sharding, inputs)
    train = prepared.train
    config, attention = choose_attention(config, foundation, train, processes)
    partition = partition if prepared.data is data else inputs.divide(config, prepared.data.train)
    clients = _clients(config, partition, prepared, foundation, processes)
    # A process that found bad input would not be there when the others exchange the state.
    with processes.raise_on_all():
        sweep_model = make_sweep_model(config.execution, foundation, train, sharding)
        method = _make_method(config, foundation, sweep_model, train, clients, processes)
        state = _initial_state(config, foundation, sweep_model, train, method)
        fit = _stand_in_fit(config, prepared, foundation, sweep_model, processes, inputs)
    # Equal draws give equal states, to the last bit only on equal hardware.
    processes.broadcast_(list(state.tensors().values()))
    most, sharded_over = most_participants(config.clients, clients), processes if sharding else None
    return Experiment(
        config=config,
        domains=data.domains,
        train_data=prepared.data.train,
        train_samples=train,
        test_samples=prepared.test,
        clients=clients,
        foundation=foundation,
        sweep_model=sweep_model,
        method=method,
        server=ServerOptimizer(config.server, state),
        executor=make_executor(config, foundation, sweep_model, train, most, len(state.heads), sharded_over),
        evaluator=Evaluator(foundation, sweep_model, prepared.test, data.domains, processes),
        initial_state=state,
        processes=processes,
        division=_division(config, foundation, train, processes),
        training=with_step_limit(config.training, clients),
        stand_in_fit=fit,
        newly_cached=prepared.newly_cached,
        processing=prepared.processing,
        choices={"precision": precision, "attention": attention},
    )


def _division(config: ExperimentConfig, foundation: Foundation, train: Samples, processes: Processes) -> WorkDivision:
    by_cost_alone = config.execution.deterministic or is_sharded(foundation.model)
    return WorkDivision(processes, train.lengths, by_cost_alone=by_cost_alone)


def _clients(
    config: ExperimentConfig, partition: Partition, prepared: PreparedData, foundation: Foundation, processes: Processes
) -> Clients:
    costs = CostModel(foundation, prepared.train, config.lora, config.training) if config.clients.devices else None
    domains, depth = prepared.data.domains, foundation.depth
    return make_clients(config, partition, domains, depth, processes=processes.count, costs=costs)


def _load(
    config: ExperimentConfig, device: torch.device, processes: Processes, sharding: Sharding | None, inputs: Inputs
) -> tuple[DomainData, Foundation]:
    """Load the data and a model for their task, and find its parts."""
    # Before anything is loaded, which may take long.
    validate(config)
    if sharding is not None:
        sharding.check(config)
    # Bad input that one process finds in its files must reach the others before they make passes together.
    with processes.raise_on_all(), Stage("reading the data"):
        data = inputs.load_data(config)
    if config.execution.cuda_graphs == "on" and data.task != "image_classification":
        # What their models compute depends on the lengths of the texts, and some models wait for the GPU to learn them.
        raise InputError("execution.cuda_graphs: found on with texts, expected off")
    classes = None if data.task == "causal_lm" else len(data.classes)
    if classes == 1:
        raise InputError(f"data.root: found {data.classes[0]!r} as the only class, expected at least two")
    with processes.raise_on_all(), Stage("loading the model"):
        model = inputs.load_model(config, classes, device, sharding)
    if (model.main_input_name == "pixel_values") != (data.task == "image_classification"):
        raise InputError(
            f"model.path: found a {model.config.model_type} model, which takes {model.main_input_name}, "
            f"expected one for the {data.task} of data.source {config.data.source}"
        )
    return data, make_foundation(model, config.lora, classes=classes, block_path=config.model.block_path)


def _prepare(
    config: ExperimentConfig,
    data: DomainData,
    foundation: Foundation,
    processes: Processes,
    sharding: Sharding | None,
    inputs: Inputs,
) -> PreparedData:
    """Decode or tokenize the samples, after the model has been tried on an image of their size."""
    path, settings, preprocessing = inputs.model_path(config), foundation.model.config, None
    if data.task == "image_classification":
        with processes.raise_on_all():
            preprocessing = preprocessing_for(path, settings, config.data.image_size, inputs.processor)
        if sharding is None:
            with Stage("trying the model on an image"):
                check_image_size(foundation, preprocessing)
                warn_of_slow_images(config, foundation, preprocessing, data)
    with processes.raise_on_all():
        cut = config.lora.dropout == 0 and not config.trace
        return prepare(data, config.data, path, settings, inputs.processor, preprocessing, cut_texts=cut)


def _make_method(
    config: ExperimentConfig,
    foundation: Foundation,
    model: SweepModel,
    train: Samples,
    clients: Clients,
    processes: Processes,
) -> Method:
    seed = config.seed
    federation = Federation(
        config=config.method,
        clients=clients,
        depth=foundation.depth,
        layout=foundation.adapter_layout,
        seed=seed,
        fisher=FisherInformation(foundation, model, train, seed=seed, processes=processes),
        adapted=foundation.adapted,
        deterministic=config.execution.deterministic,
        trains_classifier=foundation.task.trains_head,
        capacities_drawn=config.clients.capacity_schedule == "drawn",
        rounds=config.rounds,
    )
    with Stage("preparing the method"):
        return make_method(federation)


def _stand_in_fit(
    config: ExperimentConfig,
    prepared: PreparedData,
    foundation: Foundation,
    model: SweepModel,
    processes: Processes,
    inputs: Inputs,
) -> StandInFit | None:
    if not config.method.has_stand_ins:
        return None
    settings = foundation.model.config
    samples, rows = server_samples(config, prepared, inputs.model_path(config), settings, inputs.processor)
    return StandInFit(foundation, model, samples, rows, config.method, config.seed, processes)


def _initial_state(
    config: ExperimentConfig, foundation: Foundation, model: SweepModel, train: Samples, method: Method
) -> GlobalState:
    layout, seed = foundation.adapter_layout, config.seed
    adapters = initial_adapters(layout, foundation.depth, seed=seed, dtype=foundation.adapter_dtype)
    heads = initial_heads(config.model, foundation, model, train, seed=seed)
    return method.initial_state(GlobalState(adapters.to(foundation.device), heads), foundation.base)


def make_clients(
    config: ExperimentConfig,
    partition: Partition,
    domains: Sequence[str],
    depth: int,
    *,
    processes: int,
    costs: CostModel | None = None,
) -> Clients:
    """Make the clients of a `partition` of these `domains`, with at most `depth` blocks, with ranks and devices.

    Where memory decides the capacities, every capacity is 1 until the `costs` are known.

    Raises:
        InputError: the partition or the model does not allow the clients that `config` asks for.
    """
    count, wanted = len(partition.samples), config.clients
    devices = None
    # Clients that mix domains get the entries in turn.
    names = domains if partition.by_domain else None
    if wanted.devices and wanted.device_schedule == "drawn":
        devices = draw_devices(wanted.devices, count, config.seed)
    elif wanted.devices:
        devices = devices_by_domain(wanted.devices, partition.groups(len(wanted.devices)), names, config.seed)
    ranks = ranks_by_domain(wanted.ranks, partition.groups(len(wanted.ranks)), names, config.lora.rank)
    blocks = np.ones(count, dtype=np.int64)
    if wanted.capacities != "memory":
        blocks = capacities_by_domain(wanted.capacities, partition.groups(len(wanted.capacities)), names, depth)
    clients = Clients(partition.samples, partition.domains, blocks, ranks, devices, partition.sizes)
    if wanted.capacities == "memory" and costs is not None and devices is not None:
        blocks = capacities_by_memory(devices, costs, clients.ranks_or(config.lora.largest_rank))
        clients = replace(clients, capacities=blocks)
    check_sampling(wanted, clients, processes=processes)
    return clients
