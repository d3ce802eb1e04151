"""The cost of training each client's sub-model by itself: parameters, bytes, samples, FLOPs and memory.

Blocks are measured once, and the cost of a sub-model is a sum over its blocks, so counting a round of 100,000
participants is fast. The FLOPs of a sample in each block that its client holds are

- forward: F + P + 2·n·r·(in + out) for every adapter target. F are the FLOPs of the frozen products, P those of
  products of activations (attention); n is the number of the target's rows for a sample, r the client's rank;
- backward, from the client's first trained block on: F + 2·P + 2·n·r·(in + out). Frozen weights need no gradient, both
  operands of P do;
- in trained blocks, the gradients of the trained factors: 2·n·r·in for A and 2·n·r·out for B.

A stand-in of rank k in place of a block takes 4·t·k·d forward, and from the first trained block on as much backward; t
is the number of a sample's tokens, d that of their features.

A multiplication with addition is two FLOPs. Embedding, norms, activations, heads and optimizers are not counted. The
gradient of the first trained block's input is counted, although it is not needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fedra_engine.config import LoraConfig, TrainingConfig
from fedra_engine.costs.activations import kept_of_a_sample
from fedra_engine.data.samples import Samples
from fedra_engine.execution.banks import bytes_per_parameter
from fedra_engine.execution.memory import hidden_shape
from fedra_engine.federation.allocation import Allocation
from fedra_engine.federation.assignment import Assignment
from fedra_engine.federation.clients import Clients
from fedra_engine.federation.work import local_step_counts, with_step_limit
from fedra_engine.methods.base import Method
from fedra_engine.models.adapters import Factor
from fedra_engine.models.foundation import Foundation, replace_module, share_parameters
from fedra_engine.models.quantization import has_quantized_weight, scales_of
from fedra_engine.models.stand_ins import map_parameters
from fedra_engine.models.structure import is_linear, linear_shape
from fedra_engine.runtime.errors import count_of, span_of
from fedra_engine.runtime.tables import bytes_text, flops_text

Counts = NDArray[np.float64]
_PROBED = 16
"""Number of samples whose FLOPs are averaged; texts differ in length."""
_BATCHED_PRODUCTS = {torch.ops.aten.bmm, torch.ops.aten.baddbmm}
"""The operations of products of activations."""


@dataclass(frozen=True)
class BlockFlops:
    """Forward FLOPs of one sample in each block, float64 [blocks].

    Attributes:
        frozen: products with frozen weights.
        activations: products of activations.
        a: products with all adapters' A, at their full ranks.
        b: the same for B.
        hidden: tokens of a sample, and features of a token.
    """

    frozen: Counts
    activations: Counts
    a: Counts
    b: Counts
    hidden: tuple[int, int]


@torch.no_grad()
def measure_block_flops(foundation: Foundation, samples: Samples) -> BlockFlops:
    """Run the frozen model on a few samples and count its products."""
    count = len(samples.domains)
    rows = torch.linspace(0, count - 1, min(_PROBED, count)).round().long()
    # The counter does not know every kernel of fused attention.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        inputs = samples.inputs(rows, foundation.device, foundation.dtype)
        _, tokens, features = hidden_shape(_with_plain_products(foundation), inputs)
    by_module, layout = counter.get_flop_counts(), foundation.adapter_layout

    def flops(module: str, *, batched_only: bool = False) -> float:
        products = by_module.get(module, {}).items()
        return sum(n for product, n in products if product in _BATCHED_PRODUCTS or not batched_only) / len(rows)

    frozen, activations, a, b = np.zeros((4, foundation.depth))
    for index, block in enumerate(foundation.blocks):
        name = f"{type(foundation.model).__name__}.{foundation.block_path}.{index}"
        # A Linear on a transposed view, as in token-mixing MLPs, is a batched product too.
        linears = [f"{name}.{path}" for path, module in block.named_modules() if is_linear(module)]
        activations[index] = flops(name, batched_only=True) - sum(flops(path, batched_only=True) for path in linears)
        frozen[index] = flops(name) - activations[index]
        for target in layout.targets if foundation.adapted[index] else ():
            # The frozen product takes 2·n·in·out, that of A 2·n·in·r.
            a[index] += flops(f"{name}.{target.path}") * (target.rank / target.out_features)
            b[index] += flops(f"{name}.{target.path}") * (target.rank / target.in_features)
    return BlockFlops(frozen, activations, a, b, (tokens, features))


def _with_plain_products(foundation: Foundation) -> Foundation:
    """A foundation whose quantized layers, whose products have no counted names, are plain ones of the same shape."""
    model = share_parameters(foundation.model)
    for path, module in foundation.model.named_modules():
        if has_quantized_weight(module):
            replace_module(model, path, _ZeroLinear(*linear_shape(module)))
    return replace(foundation, model=model)


class _ZeroLinear(nn.Module):
    """A Linear whose weights are one zero."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self._shape = outputs, inputs

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, x.new_zeros(()).expand(self._shape))


def parameters_of(blocks: Allocation, assignment: Assignment, factor: Factor, foundation: Foundation) -> Counts:
    """Parameters of `factor` in `blocks` [participants, blocks] at each participant's rank, and of its heads."""
    layout = foundation.adapter_layout
    columns = layout.columns(factor)
    slot = (columns.stop - columns.start) * _rank_shares(assignment, layout.rank)
    heads = assignment.has_exit.sum(axis=1) * foundation.head_layout.trained_size
    return (blocks & foundation.adapted).sum(axis=1) * slot + heads


def processed_samples(samples: NDArray[np.int64], training: TrainingConfig) -> NDArray[np.int64]:
    """Samples processed in a round by clients that have `samples` [clients], int64 [clients]."""
    epochs, rest = np.divmod(local_step_counts(samples, training), -(-samples // training.batch_size))
    return epochs * samples + np.minimum(rest * training.batch_size, samples)


def sample_flops(assignment: Assignment, flops: BlockFlops, rank: int, stand_in_rank: int) -> Counts:
    """Training FLOPs of one sample of each participant, float64 [participants].

    `rank` is that of the adapters in `flops`, `stand_in_rank` that of stand-ins, which only some assignments have.
    """
    held, trained, reached = assignment.held, assignment.trained_blocks, assignment.reached
    replaced = assignment.replaced_blocks
    maps = replaced.sum(axis=1) + (replaced & (trained.cumsum(axis=1) > 0)).sum(axis=1)
    adapters = flops.a + flops.b
    gradients = {"A": flops.a, "B": flops.b, "both": adapters}[assignment.factors]
    lora = held @ adapters + reached @ adapters + trained @ gradients
    forward = held @ (flops.frozen + flops.activations)
    backward = reached @ (flops.frozen + 2 * flops.activations)
    tokens, features = flops.hidden
    stand_ins = maps * (4.0 * tokens * stand_in_rank * features)
    total: Counts = forward + backward + lora * _rank_shares(assignment, rank) + stand_ins
    return total


def _rank_shares(assignment: Assignment, full: int) -> Counts:
    return np.ones(len(assignment.held)) if assignment.ranks is None else assignment.ranks / full


@dataclass(frozen=True)
class ClientCosts:
    """The cost of each participant's sub-model in a round, float64 [participants].

    Attributes:
        blocks: number of blocks held.
        trained: number of trained parameters.
        uploaded: bytes sent to the server.
        downloaded: bytes received before training: adapters of all held blocks, heads and, if the method changes the
            frozen weights of these blocks, their last change; and the stand-ins of the blocks that it lacks, as if it
            kept none from earlier rounds. The frozen weights themselves are on the device already.
        frozen_memory: bytes of frozen weights and stand-ins.
        trained_memory: bytes of trained parameters, gradients and optimizer state.
        activation_memory: bytes kept for the backward pass of the largest batch, made of the longest samples.
        samples: number of samples, over all local steps.
        sample_flops: training FLOPs of a sample, in the blocks.
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

    def __repr__(self) -> str:
        if not len(self.blocks):
            return "ClientCosts(no participants)"
        people, blocks = count_of(len(self.blocks), "participant"), span_of(self.blocks.astype(int).tolist(), "block")
        most, flops = bytes_text(self.memory.max()), flops_text(self.flops.sum())
        return f"ClientCosts({people} with {blocks}: at most {most}, {flops} FLOPs)"

    @property
    def memory(self) -> Counts:
        """Bytes of training, without temporary memory of single operations."""
        return self.frozen_memory + self.trained_memory + self.activation_memory

    @property
    def flops(self) -> Counts:
        """FLOPs of the whole round, in the blocks."""
        return self.samples * self.sample_flops

    def select(self, rows: NDArray[np.int64]) -> ClientCosts:
        """The costs of the participants `rows`."""
        return ClientCosts(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})


class CostModel:
    """Counts the costs of sub-models of a foundation model."""

    def __init__(self, foundation: Foundation, samples: Samples, lora: LoraConfig, training: TrainingConfig) -> None:
        """Measure the blocks on a few of the training `samples`."""
        self._foundation = foundation
        self._training = training
        self._flops = measure_block_flops(foundation, samples)
        self._block_bytes = np.array([_bytes(block) for block in foundation.blocks], dtype=np.float64)
        heads = [foundation.head] if foundation.task.trains_head else []
        own = [*heads, *([] if foundation.norm is None else [foundation.norm])]
        self._other_bytes = _bytes(foundation.model, without=own) - self._block_bytes.sum()
        # A sub-model by itself has no second copy of its adapters in the precision of the computation.
        self._bytes_per_parameter = bytes_per_parameter(training, foundation.adapter_dtype, foundation.adapter_dtype)
        self._kept = cache(partial(kept_of_a_sample, foundation, samples, lora))

    def count(
        self, clients: Clients, participants: NDArray[np.int64], assignment: Assignment, method: Method
    ) -> ClientCosts:
        """The costs of the `participants` under an `assignment` of `method`."""
        foundation, held = self._foundation, assignment.held
        itemsize = foundation.adapter_dtype.itemsize
        trained = parameters_of(assignment.trained_blocks, assignment, assignment.factors, foundation)
        uploaded = parameters_of(assignment.trained_blocks, assignment, method.uploaded_factors(assignment), foundation)
        downloaded = parameters_of(held, assignment, method.downloaded_factors(), foundation)
        if method.writes_base:
            downloaded = downloaded + held @ self._written_parameters(assignment)
        stand_in_rank = method.federation.config.stand_in_rank
        stand_ins = assignment.replaced_blocks.sum(axis=1) * map_parameters(self._flops.hidden[1], stand_in_rank)
        everything = parameters_of(held, assignment, "both", foundation)
        counts = clients.sample_counts(participants)
        batch = np.minimum(counts, self._training.batch_size)
        return ClientCosts(
            blocks=held.sum(axis=1).astype(np.float64),
            trained=trained,
            uploaded=uploaded * itemsize,
            downloaded=(downloaded + stand_ins) * itemsize,
            frozen_memory=self._other_bytes + held @ self._block_bytes + (everything - trained + stand_ins) * itemsize,
            trained_memory=trained * self._bytes_per_parameter,
            activation_memory=batch * self._activation_bytes(assignment),
            samples=processed_samples(counts, with_step_limit(self._training, clients)).astype(np.float64),
            sample_flops=sample_flops(assignment, self._flops, foundation.adapter_layout.rank, stand_in_rank),
        )

    def memory_by_blocks(self, rank: int) -> Counts:
        """Bytes to train both factors of any 1, 2, … blocks on full batches, [blocks]."""
        foundation, layout = self._foundation, self._foundation.adapter_layout
        kept = self._training.batch_size * self._kept(rank, "both")
        slot = layout.of_rank(rank).size * self._bytes_per_parameter
        block = self._block_bytes + slot + kept[:-1]
        head = foundation.head_layout.trained_size * self._bytes_per_parameter
        total: Counts = self._other_bytes + head + kept[-1] + np.cumsum(np.sort(block)[::-1])
        return total

    def _written_parameters(self, assignment: Assignment) -> Counts:
        """Size of a round's change to the weights of each block, float64 [blocks].

        The change is sent as the stacked factors of all participants, or as matrices if these are smaller.
        """
        layout = self._foundation.adapter_layout
        participants = _rank_shares(assignment, layout.rank) @ assignment.trained_blocks
        sizes = [(t.rank * (t.in_features + t.out_features), t.in_features * t.out_features) for t in layout.targets]
        total: Counts = np.sum([np.minimum(participants * factors, matrix) for factors, matrix in sizes], axis=0)
        return total

    def _activation_bytes(self, assignment: Assignment) -> Counts:
        """Bytes kept of one sample, [participants]; none in blocks before a participant's first trained one."""
        reached = assignment.reached
        full = self._foundation.adapter_layout.rank
        most = self._kept(full, assignment.factors)
        if assignment.ranks is None:
            return most[-1] + reached @ most[:-1]
        # The memory of adapters grows linearly with their rank.
        least = self._kept(1, assignment.factors)
        share = (assignment.ranks - 1) / max(full - 1, 1)
        extra: Counts = share * (reached @ (most - least)[:-1])
        return least[-1] + reached @ least[:-1] + extra


def _bytes(module: nn.Module, without: Sequence[nn.Module] = ()) -> int:
    """Bytes of a module's parameters, and of the scales of quantized ones; shared ones count once."""
    left_out = {id(parameter) for other in without for parameter in other.parameters()}
    tensors: list[Tensor] = [parameter for parameter in module.parameters() if id(parameter) not in left_out]
    tensors += [scale for part in module.modules() if has_quantized_weight(part) for scale in scales_of(part).values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
