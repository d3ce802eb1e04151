"""The layout of a block's LoRA factors in a flat vector, and of banks of such vectors.

A *slot* is one (client, block) pair. A bank holds one slot per row, so hand-out, optimizer and aggregation are
single operations over rows, and an op reads the factors of any target as a strided view. All A come first, then all
B, so that a method which trains or shares only one factor works on one range of columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fedra_engine.runtime.errors import count_of
from fedra_engine.runtime.randomness import generator

Factor = Literal["both", "A", "B"]
"""One factor of a LoRA product, or both."""


@dataclass(frozen=True)
class Target:
    """A Linear inside a block that carries an adapter: its path inside the block, its shape, and its adapter's.

    Attributes:
        rank: inner dimension of A [rank, in] and B [out, rank].
        scale: factor of the adapter's product.
    """

    path: str
    in_features: int
    out_features: int
    rank: int
    scale: float


@dataclass(frozen=True)
class AdapterLayout:
    """Positions of each target's A [rank, in] and B [out, rank] in a slot of `size` parameters."""

    targets: tuple[Target, ...]

    def __repr__(self) -> str:
        return f"AdapterLayout({count_of(len(self.targets), 'target')}, {self.size:,} parameters per block)"

    @property
    def rank(self) -> int:
        """The largest rank of a target."""
        return max(target.rank for target in self.targets)

    @cached_property
    def _offsets(self) -> tuple[int, ...]:
        sizes = [*(t.rank * t.in_features for t in self.targets), *(t.rank * t.out_features for t in self.targets)]
        return tuple(accumulate(sizes, initial=0))

    def of_rank(self, rank: int) -> AdapterLayout:
        """The layout of the same targets whose ranks are at most `rank`."""
        return AdapterLayout(tuple(replace(target, rank=min(target.rank, rank)) for target in self.targets))

    @property
    def size(self) -> int:
        """LoRA parameters of one block."""
        return self._offsets[-1]

    def first_columns(self, target: int) -> tuple[int, int]:
        """The columns at which A and B of a target begin."""
        return self._offsets[target], self._offsets[len(self.targets) + target]

    def columns(self, factor: Factor) -> slice:
        """The columns of a slot that hold A, B or both."""
        middle = self._offsets[len(self.targets)]
        return {"both": slice(0, self.size), "A": slice(0, middle), "B": slice(middle, self.size)}[factor]

    def lora_a(self, bank: Tensor, target: int) -> Tensor:
        """View […, rank, in] of slots […, size]."""
        start, end = self._offsets[target : target + 2]
        return bank[..., start:end].unflatten(-1, (self.targets[target].rank, -1))

    def lora_b(self, bank: Tensor, target: int) -> Tensor:
        """View […, out, rank] of slots […, size]."""
        start, end = self._offsets[len(self.targets) + target : len(self.targets) + target + 2]
        return bank[..., start:end].unflatten(-1, (-1, self.targets[target].rank))

    def truncate(self, slots: Tensor, rank: int) -> None:
        """Zero the rows of A and columns of B beyond `rank` in `slots` […, size], in place."""
        for target in range(len(self.targets)):
            self.lora_a(slots, target)[..., rank:, :] = 0
            self.lora_b(slots, target)[..., rank:] = 0

    def per_rank(self, values: Tensor) -> Tensor:
        """Expand `values` […, rank], one for each row of A and column of B, to slots […, size]."""
        spread = values.new_empty(*values.shape[:-1], self.size)
        for index, target in enumerate(self.targets):
            self.lora_a(spread, index).copy_(values[..., : target.rank, None])
            self.lora_b(spread, index).copy_(values[..., None, : target.rank])
        return spread

    def per_target(self, values: Tensor) -> Tensor:
        """Expand `values` […, targets], one for both factors of each target, to slots […, size]."""
        spread = values.new_empty(*values.shape[:-1], self.size)
        for target in range(len(self.targets)):
            self.lora_a(spread, target).copy_(values[..., target, None, None])
            self.lora_b(spread, target).copy_(values[..., target, None, None])
        return spread

    def named_factors(self, slot: Tensor) -> Iterator[tuple[str, Tensor]]:
        """(`<target path>.lora_A`, [rank, in]) and (`<target path>.lora_B`, [out, rank]) views of a slot [size]."""
        for index, target in enumerate(self.targets):
            yield f"{target.path}.lora_A", self.lora_a(slot, index)
            yield f"{target.path}.lora_B", self.lora_b(slot, index)


def initial_adapters(layout: AdapterLayout, depth: int, *, seed: int, dtype: torch.dtype, round: int = 0) -> Tensor:
    """New global adapters [blocks, size]: A is Kaiming-uniform(√5), drawn for `round`, and B is zero."""
    rng = generator(seed, round=round, purpose="initial adapters")
    bank = torch.zeros(depth, layout.size, dtype=dtype)
    for index, target in enumerate(layout.targets):
        # Kaiming-uniform with a = √5 is uniform in ±1/√fan_in.
        bound = 1 / np.sqrt(target.in_features)
        factors = rng.uniform(-bound, bound, size=(depth, target.rank, target.in_features))
        layout.lora_a(bank, index).copy_(torch.from_numpy(factors))
    return bank
