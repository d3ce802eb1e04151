"""What training its own sub-model costs a client: memory, FLOPs and bytes, by counting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from fedra_engine.comparison.accounting import measure_block_flops, parameters_of, sample_flops
from fedra_engine.config import ExperimentConfig, TrainingConfig
from fedra_engine.data.samples import Samples
from fedra_engine.execution.dropout import DropoutKeys
from fedra_engine.execution.submodel import Submodel, build_submodel
from fedra_engine.execution.work import LocalWork
from fedra_engine.experiment import Experiment

_PROBED = 2
"""Samples whose activations are measured and scaled up to a batch."""


@dataclass(frozen=True)
class ClientCosts:
    """What a client's own sub-model costs, however the executor batches it.

    Attributes:
        blocks: blocks it holds.
        trained: parameters it trains.
        uploaded: bytes it sends to the server in a round.
        frozen_memory: bytes of its frozen weights.
        trained_memory: bytes of its trained parameters, their gradients and their optimizer state.
        activation_memory: bytes kept for the backward pass of one batch.
        flops: of training on one sample, in the blocks.
    """

    blocks: int
    trained: int
    uploaded: int
    frozen_memory: int
    trained_memory: int
    activation_memory: int
    flops: float

    @property
    def memory(self) -> int:
        """Bytes that training takes, without what an operation needs while it runs."""
        return self.frozen_memory + self.trained_memory + self.activation_memory


def client_costs(config: ExperimentConfig, experiment: Experiment, clients: NDArray[np.int64]) -> list[ClientCosts]:
    """The costs of each of `clients` as it is assigned in the first round."""
    foundation, method = experiment.foundation, experiment.method
    assignment = method.assign(clients, 0)
    trained = parameters_of(assignment, assignment.factors, foundation)
    uploaded = parameters_of(assignment, method.uploaded_factors(assignment), foundation)
    flops = sample_flops(assignment, measure_block_flops(foundation, experiment.train), foundation.adapter_layout.rank)
    itemsize = foundation.adapter_dtype.itemsize
    copies = 2 + _moments(config.training)
    costs = []
    for row, client in enumerate(clients.tolist()):
        submodel = build_submodel(foundation, config.lora, assignment, row, client, experiment.initial_state)
        keys = DropoutKeys(config.lora.dropout, seed=config.seed, round=0, clients=[client], steps=[0])
        submodel.use_dropout_keys(keys)
        rows = LocalWork(experiment.clients, clients, config.training, config.seed, 0, 0.0).batches(client)[0]
        activations = _activation_bytes(submodel, experiment.train, rows.tolist())
        costs.append(
            ClientCosts(
                blocks=int(assignment.held[row].sum()),
                trained=int(trained[row]),
                uploaded=int(uploaded[row]) * itemsize,
                frozen_memory=_frozen_bytes(submodel),
                trained_memory=int(trained[row]) * copies * itemsize,
                activation_memory=activations,
                flops=float(flops[row]),
            )
        )
    return costs


def _moments(training: TrainingConfig) -> int:
    """Tensors of the optimizer's state for each trained one."""
    return 2 if training.optimizer == "adamw" else int(training.momentum > 0)


def _frozen_bytes(submodel: Submodel) -> int:
    """Bytes of a sub-model's frozen weights, once it has run."""
    trained = {id(parameter) for parameter in submodel.parameters()}
    frozen = {id(p): p for p in submodel.model.parameters() if id(p) not in trained}
    return sum(parameter.numel() * parameter.element_size() for parameter in frozen.values())


def _activation_bytes(submodel: Submodel, samples: Samples, batch: Sequence[int]) -> int:
    """Bytes that autograd keeps of a pass over `batch`, weights left out."""
    weights = _storages([*submodel.model.parameters(), *submodel.model.buffers()])
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    rows = torch.tensor(batch[:_PROBED])
    foundation = submodel.foundation
    inputs = samples.inputs(rows, foundation.head.weight.device, foundation.dtype)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = [nn.functional.log_softmax(logits, dim=-1).sum() for logits in submodel.logits(inputs)]
    del losses
    return sum(kept.values()) * len(batch) // len(rows)


def _storages(tensors: Sequence[Tensor]) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}
