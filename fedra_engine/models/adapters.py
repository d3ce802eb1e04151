"""Adapter storage: how the LoRA factors of a block lie in one flat vector, and banks of many such vectors.

A *slot* is one (client, block) pair. A bank holds one slot per row, so hand-out, optimizer and aggregation are
single operations over rows, and an op reads the factors of any target as a strided view.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from fedra_engine.randomness import generator


@dataclass(frozen=True)
class Target:
    """A Linear inside a block that carries an adapter: its path inside the block and its shape."""

    path: str
    in_features: int
    out_features: int


@dataclass(frozen=True)
class AdapterLayout:
    """Where each target's A [rank, in] and B [out, rank] lie in a slot's vector of `size` parameters."""

    targets: tuple[Target, ...]
    rank: int

    @cached_property
    def _offsets(self) -> tuple[int, ...]:
        sizes = (self.rank * width for t in self.targets for width in (t.in_features, t.out_features))
        return tuple(accumulate(sizes, initial=0))

    @property
    def size(self) -> int:
        """LoRA parameters of one block."""
        return self._offsets[-1]

    def lora_a(self, bank: Tensor, target: int) -> Tensor:
        """View […, rank, in] of slots […, size]."""
        start, end = self._offsets[2 * target : 2 * target + 2]
        return bank[..., start:end].unflatten(-1, (self.rank, -1))

    def lora_b(self, bank: Tensor, target: int) -> Tensor:
        """View […, out, rank] of slots […, size]."""
        start, end = self._offsets[2 * target + 1 : 2 * target + 3]
        return bank[..., start:end].unflatten(-1, (-1, self.rank))

    def named_factors(self, slot: Tensor) -> Iterator[tuple[str, Tensor]]:
        """(`<target path>.lora_A`, [rank, in]) and (`<target path>.lora_B`, [out, rank]) views of a slot [size]."""
        for index, target in enumerate(self.targets):
            yield f"{target.path}.lora_A", self.lora_a(slot, index)
            yield f"{target.path}.lora_B", self.lora_b(slot, index)


def initial_adapters(layout: AdapterLayout, depth: int, *, seed: int, dtype: torch.dtype) -> Tensor:
    """The global adapters before the first round, [blocks, size]: A Kaiming-uniform(√5) as in LoRA, B zero."""
    rng = generator(seed, purpose="initial adapters")
    bank = torch.zeros(depth, layout.size, dtype=dtype)
    for index, target in enumerate(layout.targets):
        # Kaiming-uniform with a = √5 is uniform in ±1/√fan_in.
        bound = 1 / np.sqrt(target.in_features)
        factors = rng.uniform(-bound, bound, size=(depth, layout.rank, target.in_features))
        layout.lora_a(bank, index).copy_(torch.from_numpy(factors))
    return bank
