"""What local training takes by counting, not by measuring: parameters, bytes, samples and FLOPs of each participant.

A client's own sub-model is counted, however the executor batches it. A sample costs, in each block that its client
holds,

- forward: F + P + 2·n·r·(in + out) for every adapter target. F are the FLOPs of the frozen products, P those of
  products of activations (attention); n is the target's rows for a sample, r the client's rank;
- backward, in the blocks from the client's first trained one on: F + 2·P + 2·n·r·(in + out). Frozen weights need no
  gradient, both operands of P do;
- in trained blocks, the gradients of the factors: 2·n·r·in for A and 2·n·r·out for B, if it trains them.

A multiplication with addition is two FLOPs. Embedding, norms, activations, heads and optimizers are not counted; that
the input of the first trained block needs no gradient is not made use of.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fedra_engine.config import TrainingConfig
from fedra_engine.data.samples import Samples
from fedra_engine.federation.allocation import Allocation
from fedra_engine.federation.assignment import Assignment
from fedra_engine.federation.clients import local_step_counts
from fedra_engine.models.adapters import AdapterLayout, Factor
from fedra_engine.models.foundation import Foundation
from fedra_engine.models.structure import is_linear

_PROBED = 16
"""Samples whose FLOPs are averaged; texts differ in length."""


@dataclass(frozen=True)
class BlockFlops:
    """Forward FLOPs of one sample in each block, float64 [blocks].

    Attributes:
        frozen: products with frozen weights.
        activations: products of activations.
        a: products of all adapters' A with their inputs, at the layout's full rank.
        b: products of all adapters' B.
    """

    frozen: NDArray[np.float64]
    activations: NDArray[np.float64]
    a: NDArray[np.float64]
    b: NDArray[np.float64]


def parameters_of(assignment: Assignment, factor: Factor, foundation: Foundation) -> NDArray[np.float64]:
    """LoRA parameters of `factor` in the blocks each participant trains, and its heads, float64 [participants]."""
    return _parameters(assignment.trained_blocks, assignment, factor, foundation)


def received_parameters(
    assignment: Assignment, factor: Factor, foundation: Foundation, *, writes_base: bool
) -> NDArray[np.float64]:
    """What the server sends each participant before it trains, in parameters, float64 [participants].

    That is `factor` of the adapters of all blocks it holds, its heads and, where a method `writes_base`, how the frozen
    weights of these blocks have changed since the round before. The frozen weights themselves are there already.
    """
    received = _parameters(assignment.held, assignment, factor, foundation)
    if not writes_base:
        return received
    return received + assignment.held @ _written_parameters(assignment, foundation.adapter_layout)


def _parameters(
    blocks: Allocation, assignment: Assignment, factor: Factor, foundation: Foundation
) -> NDArray[np.float64]:
    """Parameters of `factor` in `blocks` [participants, blocks], at each participant's rank, and of its heads."""
    layout = foundation.adapter_layout
    columns = layout.columns(factor)
    slot = (columns.stop - columns.start) * _rank_shares(assignment, layout.rank)
    return blocks.sum(axis=1) * slot + assignment.exit_counts() * foundation.head_layout.trained_size


def _written_parameters(assignment: Assignment, layout: AdapterLayout) -> NDArray[np.float64]:
    """Parameters of the change that a round makes to the weights of each block, float64 [blocks].

    The change is sent as all participants' factors, stacked, or as matrices where these are smaller.
    """
    stacked = (_rank_shares(assignment, layout.rank) * layout.rank) @ assignment.trained_blocks
    shapes = [(target.in_features, target.out_features) for target in layout.targets]
    per_target = [np.minimum(stacked * (rows + columns), rows * columns) for rows, columns in shapes]
    total: NDArray[np.float64] = np.sum(per_target, axis=0)
    return total


def processed_samples(samples: NDArray[np.int64], training: TrainingConfig) -> NDArray[np.int64]:
    """How many samples clients with `samples` [clients] of their own go through in a round, int64 [clients]."""
    epochs, rest = np.divmod(local_step_counts(samples, training), -(-samples // training.batch_size))
    return epochs * samples + np.minimum(rest * training.batch_size, samples)


def sample_flops(assignment: Assignment, flops: BlockFlops, rank: int) -> NDArray[np.float64]:
    """Training FLOPs of one sample of each participant, float64 [participants]; `rank` is that of `flops`."""
    held, trained, reached = assignment.held, assignment.trained_blocks, assignment.reached
    adapters = flops.a + flops.b
    gradients = {"A": flops.a, "B": flops.b, "both": adapters}[assignment.factors]
    lora = held @ adapters + reached @ adapters + trained @ gradients
    forward = held @ (flops.frozen + flops.activations)
    backward = reached @ (flops.frozen + 2 * flops.activations)
    total: NDArray[np.float64] = forward + backward + lora * _rank_shares(assignment, rank)
    return total


def _rank_shares(assignment: Assignment, full: int) -> NDArray[np.float64]:
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


_BATCHED_PRODUCTS = {torch.ops.aten.bmm, torch.ops.aten.baddbmm}
"""How products of activations are done."""
