"""What training its own sub-model takes of each client, by counting: parameters, bytes, samples, FLOPs and memory.

A client's own sub-model is counted, however the executor batches it. Blocks are measured once; what a sub-model takes
is a sum over the blocks it holds, so that a round of 100,000 participants is counted in a moment. A sample costs, in
each block that its client holds,

- forward: F + P + 2·n·r·(in + out) for every adapter target. F are the FLOPs of the frozen products, P those of
  products of activations (attention); n is the target's rows for a sample, r the client's rank;
- backward, in the blocks from the client's first trained one on: F + 2·P + 2·n·r·(in + out). Frozen weights need no
  gradient, both operands of P do;
- in trained blocks, the gradients of the factors: 2·n·r·in for A and 2·n·r·out for B, if it trains them.

A multiplication with addition is two FLOPs. Embedding, norms, activations, heads and optimizers are not counted; that
the input of the first trained block needs no gradient is not made use of.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fedra_engine.config import LoraConfig, TrainingConfig
from fedra_engine.data.samples import Samples
from fedra_engine.execution.banks import bytes_per_parameter
from fedra_engine.execution.dropout import DropoutKeys
from fedra_engine.execution.memory import record_saved
from fedra_engine.execution.sequential import Submodel
from fedra_engine.federation.allocation import Allocation
from fedra_engine.federation.assignment import Assignment
from fedra_engine.federation.clients import Clients, local_step_counts, with_step_limit
from fedra_engine.methods.base import Method
from fedra_engine.models.adapters import AdapterLayout, Factor
from fedra_engine.models.foundation import Foundation
from fedra_engine.models.state import GlobalState
from fedra_engine.models.structure import is_linear

Counts = NDArray[np.float64]
_PROBED = 16
"""Samples whose FLOPs are averaged; texts differ in length."""
_BATCHED_PRODUCTS = {torch.ops.aten.bmm, torch.ops.aten.baddbmm}
"""How products of activations are done."""


@dataclass(frozen=True)
class BlockFlops:
    """Forward FLOPs of one sample in each block, float64 [blocks].

    Attributes:
        frozen: products with frozen weights.
        activations: products of activations.
        a: products of all adapters' A with their inputs, at the layout's full rank.
        b: products of all adapters' B.
    """

    frozen: Counts
    activations: Counts
    a: Counts
    b: Counts


def parameters_of(assignment: Assignment, factor: Factor, foundation: Foundation) -> Counts:
    """LoRA parameters of `factor` in the blocks each participant trains, and its heads, float64 [participants]."""
    return _parameters(assignment.trained_blocks, assignment, factor, foundation)


def received_parameters(assignment: Assignment, factor: Factor, foundation: Foundation, *, writes_base: bool) -> Counts:
    """What the server sends each participant before it trains, in parameters, float64 [participants].

    That is `factor` of the adapters of all blocks it holds, its heads and, where a method `writes_base`, how the frozen
    weights of these blocks have changed since the round before. The frozen weights themselves are there already.
    """
    received = _parameters(assignment.held, assignment, factor, foundation)
    if not writes_base:
        return received
    return received + assignment.held @ _written_parameters(assignment, foundation.adapter_layout)


def _parameters(blocks: Allocation, assignment: Assignment, factor: Factor, foundation: Foundation) -> Counts:
    """Parameters of `factor` in `blocks` [participants, blocks], at each participant's rank, and of its heads."""
    layout = foundation.adapter_layout
    columns = layout.columns(factor)
    slot = (columns.stop - columns.start) * _rank_shares(assignment, layout.rank)
    return blocks.sum(axis=1) * slot + assignment.has_exit.sum(axis=1) * foundation.head_layout.trained_size


def _written_parameters(assignment: Assignment, layout: AdapterLayout) -> Counts:
    """Parameters of the change that a round makes to the weights of each block, float64 [blocks].

    The change is sent as all participants' factors, stacked, or as matrices where these are smaller.
    """
    stacked = (_rank_shares(assignment, layout.rank) * layout.rank) @ assignment.trained_blocks
    shapes = [(target.in_features, target.out_features) for target in layout.targets]
    per_target = [np.minimum(stacked * (rows + columns), rows * columns) for rows, columns in shapes]
    total: Counts = np.sum(per_target, axis=0)
    return total


def processed_samples(samples: NDArray[np.int64], training: TrainingConfig) -> NDArray[np.int64]:
    """How many samples clients with `samples` [clients] of their own go through in a round, int64 [clients]."""
    epochs, rest = np.divmod(local_step_counts(samples, training), -(-samples // training.batch_size))
    return epochs * samples + np.minimum(rest * training.batch_size, samples)


def sample_flops(assignment: Assignment, flops: BlockFlops, rank: int) -> Counts:
    """Training FLOPs of one sample of each participant, float64 [participants]; `rank` is that of `flops`."""
    held, trained, reached = assignment.held, assignment.trained_blocks, assignment.reached
    adapters = flops.a + flops.b
    gradients = {"A": flops.a, "B": flops.b, "both": adapters}[assignment.factors]
    lora = held @ adapters + reached @ adapters + trained @ gradients
    forward = held @ (flops.frozen + flops.activations)
    backward = reached @ (flops.frozen + 2 * flops.activations)
    total: Counts = forward + backward + lora * _rank_shares(assignment, rank)
    return total


def _rank_shares(assignment: Assignment, full: int) -> Counts:
    ranks = assignment.ranks
    return np.ones(len(assignment.held)) if ranks is None else ranks / full


@torch.no_grad()
def measure_block_flops(foundation: Foundation, samples: Samples) -> BlockFlops:
    """Run the frozen model over a few samples and count its products."""
    count = len(samples.domains)
    rows = torch.linspace(0, count - 1, min(_PROBED, count)).round().long()
    # Fused attention is one operation, which is not counted everywhere.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        foundation.model(**samples.inputs(rows, foundation.device, foundation.dtype))
    by_module, layout = counter.get_flop_counts(), foundation.adapter_layout

    def flops(block: int, path: str = "", *, batched_only: bool = False) -> float:
        name = ".".join(filter(None, (type(foundation.model).__name__, foundation.block_path, str(block), path)))
        products = by_module.get(name, {}).items()
        return sum(n for product, n in products if product in _BATCHED_PRODUCTS or not batched_only) / len(rows)

    def activations(block: int) -> float:
        # A Linear is batched too where its input is a transposed view, as in token-mixing MLPs.
        linears = [path for path, module in foundation.blocks[block].named_modules() if is_linear(module)]
        return flops(block, batched_only=True) - sum(flops(block, path, batched_only=True) for path in linears)

    def adapters(block: int, *, a: bool) -> float:
        # The frozen product takes 2·n·in·out, that of A 2·n·in·r.
        return sum(
            flops(block, target.path) * (layout.rank / (target.out_features if a else target.in_features))
            for target in layout.targets
        )

    blocks = range(foundation.depth)
    return BlockFlops(
        frozen=np.array([flops(block) - activations(block) for block in blocks]),
        activations=np.array([activations(block) for block in blocks]),
        a=np.array([adapters(block, a=True) for block in blocks]),
        b=np.array([adapters(block, a=False) for block in blocks]),
    )


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
        self._activations: dict[tuple[int, Factor], Counts] = {}

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
        kept = self._training.batch_size * self._measured(rank, "both")
        slot = layout.size * rank / layout.rank * self._bytes_per_parameter
        block = self._block_bytes + slot + kept[:-1]
        head = foundation.head_layout.trained_size * self._bytes_per_parameter
        total: Counts = self._other_bytes + head + kept[-1] + np.cumsum(np.sort(block)[::-1])
        return total

    def _activation_bytes(self, assignment: Assignment) -> Counts:
        """Bytes kept of one sample, [participants]. Blocks before a participant's first trained one keep nothing."""
        reached = assignment.reached
        full = self._foundation.adapter_layout.rank
        most = self._measured(full, assignment.factors)
        if assignment.ranks is None:
            return most[-1] + reached @ most[:-1]
        # What adapters keep grows linearly with their rank.
        least = self._measured(1, assignment.factors)
        share = (assignment.ranks - 1) / max(full - 1, 1)
        extra: Counts = share * (reached @ (most - least)[:-1])
        return least[-1] + reached @ least[:-1] + extra

    def _measured(self, rank: int, factors: Factor) -> Counts:
        """Bytes that autograd keeps of one sample in each block and, last, outside of the blocks, [blocks + 1]."""
        key = (rank, factors)
        if key not in self._activations:
            self._activations[key] = self._measure(rank, factors)
        return self._activations[key]

    def _measure(self, rank: int, factors: Factor) -> Counts:
        """What a sub-model of all blocks keeps, by what the second of two samples adds to the first."""
        foundation = self._foundation
        held = np.ones((1, foundation.depth), dtype=np.bool_)
        assignment = Assignment(held, factors=factors, ranks=np.array([rank]))
        adapters = torch.zeros(foundation.depth, foundation.adapter_layout.size, dtype=foundation.adapter_dtype)
        state = GlobalState(adapters.to(foundation.device), foundation.initial_heads())
        submodel = Submodel(foundation, self._lora, assignment, 0, 0, state)
        longest = 0 if self._samples.lengths is None else int(self._samples.lengths.argmax())
        one, two = (self._kept_bytes(submodel, torch.full((count,), longest)) for count in (1, 2))
        return two - one

    def _kept_bytes(self, submodel: Submodel, rows: Tensor) -> Counts:
        """Bytes that autograd keeps of a pass over `rows` in each block and, last, elsewhere; weights left out."""
        foundation = self._foundation
        # The client's heads take their place in the model only when it runs.
        fixed = (*submodel.model.parameters(), *submodel.model.buffers(), *submodel.parameters())
        kept, where = np.zeros(foundation.depth + 1), [foundation.depth]

        def record(size: int) -> None:
            kept[where[0]] += size

        def losses() -> list[Tensor]:
            return [nn.functional.log_softmax(logits, dim=-1).sum() for logits in submodel.logits(inputs, keys)]

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
        keys = DropoutKeys(self._lora.dropout, seed=0, round=0, clients=[0], steps=[0])
        record_saved(losses, fixed, record)
        for hook in hooks:
            hook.remove()
        return kept


def _bytes(module: nn.Module, without: nn.Module | None = None) -> int:
    """Bytes of a module's parameters, shared ones once."""
    left_out = {id(parameter) for parameter in without.parameters()} if without is not None else set()
    return sum(p.numel() * p.element_size() for p in module.parameters() if id(p) not in left_out)
