"""Launch configurations: one table per kernel, by architecture and shape class; nothing is tuned at run time.

A configuration depends on the architecture, the dtype and the bank's rank alone. It never depends on the rows
of a launch, so that a client's result cannot depend on the clients it shares the launch with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..dispatch import architecture, dot_precision

MAX_RANK = 128
NARROW_RANK = 32
MOST_LINEARS = 3
"""That one kernel takes together, as they read one input or write one gradient: query, key and value."""
GRADIENT_CHUNK = 512
"""Rows whose gradients of adapters one program sums up. Counted: the partial sums of a ViT-B block of rank 16 (0.9 MB a
chunk), which are written and read once, are then a tenth of the block's traffic."""
INTERPRETED_CHUNK = 32
"""The same in Triton's interpreter, so that clients of tests have several chunks."""


@dataclass(frozen=True)
class Tile:
    """Block shape and launch options of one kernel; unused extents are 1.

    descriptors: whether the large matrices are read by tensor descriptor where their alignment allows it.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    descriptors: bool = False

    @property
    def options(self) -> dict[str, int]:
        """The launch options."""
        return {"num_warps": self.warps, "num_stages": self.stages}

    @property
    def product_options(self) -> dict[str, int]:
        """The block shape as kernels of products of matrices take it, and the launch options."""
        return {"BLOCK_M": self.rows, "BLOCK_N": self.columns, "BLOCK_K": self.depth, **self.options}


ConfigTable = Mapping[str, Mapping[str, Tile]]
"""Tile by architecture (sm_80, sm_90, sm_100, gfx942, small, interpreter), then by shape class.

Tiles were chosen by compiling them: no spills, within the architecture's shared memory, and wide loads and stores, as
docs/results/kernel_resources.md lists them. No time has been measured.
"""


def any_rank(half: Tile, single: Tile) -> Mapping[str, Tile]:
    """The tiles of a kernel that has one for 16-bit dtypes, whatever the rank, and one for fp32."""
    return {"narrow": half, "wide": half, "float": single}


def shape_class(dtype: torch.dtype, rank: int) -> str:
    """`float` for fp32, `narrow` and `wide` for 16-bit dtypes with rank up to 32 and up to 128."""
    if dtype == torch.float32:
        return "float"
    return "narrow" if rank <= NARROW_RANK else "wide"


def choose(table: ConfigTable, tensor: Tensor, rank: int) -> Tile:
    """The tile for a launch on the tensor's device, in its dtype, with an adapter bank of this rank."""
    return table[architecture(tensor.device)][shape_class(tensor.dtype, rank)]


def rank_step(dtype: torch.dtype, rank: int) -> int:
    """How much of the rank one product takes: fp32 products are unrolled, wide ones would fill the registers."""
    return min(rank_block(rank), 16 if dtype == torch.float32 else NARROW_RANK)


def rank_block(rank: int) -> int:
    """The rank padded to what tl.dot takes: a power of two of at least 16."""
    return max(16, 1 << (rank - 1).bit_length())


def low_rank_options(x: Tensor, rank: int) -> dict[str, int | str]:
    """What every kernel with a low-rank product of x is told about it."""
    return {"RANK": rank, "RANK_BLOCK": rank_block(rank), "PRECISION": dot_precision(x)}


def gradient_chunk(tensor: Tensor) -> int:
    """Rows of a chunk of `lora_grad_output`, `lora_grad_outer` and `activation_gradient`."""
    return INTERPRETED_CHUNK if architecture(tensor.device) == "interpreter" else GRADIENT_CHUNK
