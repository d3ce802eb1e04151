"""What training its own sub-model takes of each client: memory, FLOPs and bytes, by counting.

Blocks are measured once; what a client's sub-model takes is then a sum over the blocks it holds, so that a round of
100,000 participants is counted in a moment.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedra_engine.config import LoraConfig, TrainingConfig
from fedra_engine.costs.counting import (
    measure_block_flops,
    parameters_of,
    processed_samples,
    received_parameters,
    sample_flops,
)
from fedra_engine.data.samples import Samples
from fedra_engine.execution.banks import bytes_per_parameter
from fedra_engine.execution.dropout import DropoutKeys
from fedra_engine.execution.memory import record_saved
from fedra_engine.execution.submodel import Submodel
from fedra_engine.federation.assignment import Assignment
from fedra_engine.federation.clients import Clients, with_step_limit
from fedra_engine.methods.base import Method
from fedra_engine.models.adapters import Factor
from fedra_engine.models.foundation import Foundation
from fedra_engine.models.state import GlobalState

Counts = NDArray[np.float64]


@dataclass(frozen=True)
class ClientCosts:
    """What the sub-models of some participants cost in a round, however the executor batches them.

    All are float64 [participants].

    Attributes:
        blocks: blocks it holds.
        trained: parameters it trains.
        uploaded: bytes it sends to the server.
        downloaded: bytes the server sends to it.
        frozen_memory: bytes of its frozen weights.
        trained_memory: bytes of its trained parameters, their gradients and their optimizer state.
        activation_memory: bytes kept for the backward pass of its largest batch, of the longest samples there are.
        samples: it trains on, over all local steps.
        sample_flops: of training on one of them, in the blocks.
    """

    blocks: Counts
    trained: Counts
    uploaded: Counts
    downloaded: Counts
    frozen_memory: Counts
    trained_memory: Counts
    activation_memory: Counts
    samples: Counts
    sample_flops: Counts

    @property
    def memory(self) -> Counts:
        """Bytes that training takes, without what an operation needs while it runs."""
        return self.frozen_memory + self.trained_memory + self.activation_memory

    @property
    def flops(self) -> Counts:
        """FLOPs of the whole round, in the blocks."""
        return self.samples * self.sample_flops

    def select(self, rows: NDArray[np.int64]) -> ClientCosts:
        """The costs of some participants."""
        return ClientCosts(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})


@dataclass(frozen=True)
class _Activations:
    """Bytes that autograd keeps of one sample: in each block [blocks], and outside of the blocks."""

    blocks: Counts
    outside: float


class CostModel:
    """Counts what clients' sub-models of a foundation model take."""

    def __init__(self, foundation: Foundation, samples: Samples, lora: LoraConfig, training: TrainingConfig) -> None:
        """Measure the blocks on a few of the training `samples`."""
        self._foundation = foundation
        self._samples = samples
        self._lora = lora
        self._training = training
        self._flops = measure_block_flops(foundation, samples)
        self._block_bytes = np.array([_bytes(block) for block in foundation.blocks], dtype=np.float64)
        shared = foundation.head if foundation.task.trains_head else None
        self._other_bytes = _bytes(foundation.model, shared) - self._block_bytes.sum()
        # A client's own sub-model has no second copy of its adapters in the precision of the computation.
        self._bytes_per_parameter = bytes_per_parameter(training, foundation.adapter_dtype, foundation.adapter_dtype)
        self._activations: dict[tuple[int, Factor], _Activations] = {}

    def count(
        self, clients: Clients, participants: NDArray[np.int64], assignment: Assignment, method: Method
    ) -> ClientCosts:
        """The costs of the `participants`, who are assigned something by `method`."""
        foundation, layout = self._foundation, self._foundation.adapter_layout
        itemsize = foundation.adapter_dtype.itemsize
        trained = parameters_of(assignment, assignment.factors, foundation)
        uploaded = parameters_of(assignment, method.uploaded_factors(assignment), foundation)
        downloaded = received_parameters(
            assignment, method.downloaded_factors(), foundation, writes_base=method.writes_base
        )
        everything = received_parameters(assignment, "both", foundation, writes_base=False)
        counts = clients.sample_counts(participants)
        batch = np.minimum(counts, self._training.batch_size)
        return ClientCosts(
            blocks=assignment.held.sum(axis=1).astype(np.float64),
            trained=trained,
            uploaded=uploaded * itemsize,
            downloaded=downloaded * itemsize,
            frozen_memory=self._other_bytes + assignment.held @ self._block_bytes + (everything - trained) * itemsize,
            trained_memory=trained * self._bytes_per_parameter,
            activation_memory=batch * self._activation_bytes(assignment),
            samples=processed_samples(counts, with_step_limit(self._training, clients)).astype(np.float64),
            sample_flops=sample_flops(assignment, self._flops, layout.rank),
        )

    def memory_by_blocks(self, rank: int) -> Counts:
        """Bytes that a client takes that holds 1, 2, … blocks, whichever these are, and trains both factors, [blocks].

        Its batches are full.
        """
        foundation, layout = self._foundation, self._foundation.adapter_layout
        activations = self._measured(rank, "both")
        slot = layout.size * rank / layout.rank * self._bytes_per_parameter
        block = self._block_bytes + slot + self._training.batch_size * activations.blocks
        head = foundation.head_layout.trained_size * self._bytes_per_parameter
        outside = self._other_bytes + head + self._training.batch_size * activations.outside
        total: Counts = outside + np.cumsum(np.sort(block)[::-1])
        return total

    def _activation_bytes(self, assignment: Assignment) -> Counts:
        """Bytes kept of one sample, [participants]. Blocks before a participant's first trained one keep nothing."""
        reached = assignment.reached
        full = self._foundation.adapter_layout.rank
        most = self._measured(full, assignment.factors)
        if assignment.ranks is None:
            return most.outside + reached @ most.blocks
        # What adapters keep grows linearly with their rank.
        least = self._measured(1, assignment.factors)
        share = (assignment.ranks - 1) / max(full - 1, 1)
        extra: Counts = share * (reached @ (most.blocks - least.blocks))
        return least.outside + reached @ least.blocks + extra

    def _measured(self, rank: int, factors: Factor) -> _Activations:
        key = (rank, factors)
        if key not in self._activations:
            self._activations[key] = self._measure(rank, factors)
        return self._activations[key]

    def _measure(self, rank: int, factors: Factor) -> _Activations:
        """What a sub-model of all blocks keeps, by what the second of two samples adds to the first."""
        held = np.ones((1, self._foundation.depth), dtype=np.bool_)
        assignment = Assignment(held, factors=factors, ranks=np.array([rank]))
        submodel = Submodel(self._foundation, self._lora, assignment, 0, 0, self._any_state())
        submodel.use_dropout_keys(DropoutKeys(self._lora.dropout, seed=0, round=0, clients=[0], steps=[0]))
        longest = 0 if self._samples.lengths is None else int(self._samples.lengths.argmax())
        one, two = (self._kept_bytes(submodel, torch.full((count,), longest)) for count in (1, 2))
        return _Activations(blocks=(two - one)[:-1], outside=float((two - one)[-1]))

    def _any_state(self) -> GlobalState:
        foundation = self._foundation
        adapters = torch.zeros(foundation.depth, foundation.adapter_layout.size, dtype=foundation.adapter_dtype)
        return GlobalState(adapters.to(foundation.device), foundation.initial_heads())

    def _kept_bytes(self, submodel: Submodel, rows: Tensor) -> Counts:
        """Bytes that autograd keeps of a pass over `rows` in each block and, last, elsewhere; weights left out."""
        foundation = self._foundation
        # The client's heads take their place in the model only when it runs.
        fixed = (*submodel.model.parameters(), *submodel.model.buffers(), *submodel.parameters())
        kept, where = np.zeros(foundation.depth + 1), [foundation.depth]

        def record(size: int) -> None:
            kept[where[0]] += size

        def losses() -> list[Tensor]:
            return [nn.functional.log_softmax(logits, dim=-1).sum() for logits in submodel.logits(inputs)]

        def enter(index: int) -> None:
            where[0] = index

        hooks = [
            hook
            for index, block in enumerate(submodel.held)
            for hook in (
                block.register_forward_pre_hook(lambda *_, index=index: enter(index)),
                block.register_forward_hook(lambda *_: enter(foundation.depth)),
            )
        ]
        inputs = self._samples.inputs(rows, foundation.device, foundation.dtype)
        record_saved(losses, fixed, record)
        for hook in hooks:
            hook.remove()
        return kept


def _bytes(module: nn.Module, without: nn.Module | None = None) -> int:
    """Bytes of a module's parameters, shared ones once."""
    left_out = {id(parameter) for parameter in without.parameters()} if without is not None else set()
    return sum(p.numel() * p.element_size() for p in module.parameters() if id(p) not in left_out)
