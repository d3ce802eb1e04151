"""Stand-ins: frozen low-rank maps in place of the blocks that a client does not hold (ours).

A sub-model leaves out blocks, so what its other blocks read is not what they were trained on. A stand-in adds to the
hidden states about what the missing block l would have added:
    h ← h + (h − μ_l) D_l U_l + b_l.
D_l U_l is the ridge regression of the block's residual block_l(h) − h on its input h, cut to rank k so that the fitted
residuals lose least. It has a closed form (`execution/stand_ins.py`), is never trained and never uploaded. That linear
maps can replace blocks of a trained transformer is known (TOAST, TMLR 2026; FedBRICK, AAAI 2026, distils stand-ins).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fedra_engine.models.batch_arguments import BatchArguments


class StandIns(NamedTuple):
    """A map for every block.

    Attributes:
        mean: μ, [blocks, features].
        down: D, [blocks, features, rank].
        up: U, [blocks, rank, features].
        bias: b, [blocks, features].
    """

    mean: Tensor
    down: Tensor
    up: Tensor
    bias: Tensor

    def __repr__(self) -> str:
        return f"StandIns({len(self.mean)} blocks, rank {self.down.shape[-1]})"

    def maps(self, dtype: torch.dtype) -> list[LowRankMap]:
        """The map of each block, to compute with in `dtype`."""
        maps = []
        for mean, down, up, bias in zip(*self, strict=True):
            rounded_down, rounded_up = down.to(dtype), up.to(dtype)
            exact = -(mean.double() @ rounded_down.double())
            shift = exact.to(dtype)
            # Features may be far from zero: what the shift loses by rounding would be larger than the map's output.
            rest = (exact - shift.double()) @ rounded_up.double()
            maps.append(LowRankMap(rounded_down, rounded_up, shift, (bias.double() + rest).to(dtype)))
        return maps


class LowRankMap(NamedTuple):
    """h + (h D + s) U + b: `down` [features, rank], `up` [rank, features], `shift` [rank] and `bias` [features]."""

    down: Tensor
    up: Tensor
    shift: Tensor
    bias: Tensor


def map_parameters(features: int, rank: int) -> int:
    """Numbers in the map of a block: mean and bias, and both factors."""
    return 2 * features * (1 + rank)


class StandInBlock(nn.Module):
    """A map in the place of a block of a sub-model."""

    def __init__(self, map: LowRankMap, block: nn.Module, arguments: BatchArguments) -> None:
        """Stand in for `block`, which takes `arguments`."""
        super().__init__()
        self._map = map
        # Not a submodule, whose weights a sub-model would have; models read attributes of their blocks in forward.
        self._block = (block,)
        self._arguments = arguments

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_block"][0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Take and return what the block does."""
        hidden = self._arguments.hidden_states(args, kwargs)
        down, up, shift, bias = self._map
        return self._arguments.output(hidden + ((hidden @ down + shift) @ up + bias))
