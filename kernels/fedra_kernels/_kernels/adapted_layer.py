"""The Linears of a block that read one input, as one product, and where their adapters lie in a slot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from torch import Tensor

from .configs import MAX_RANK, MOST_LINEARS
from .shared_input import AdapterColumns


@dataclass(frozen=True)
class AdaptedLayer:
    """Up to three frozen Linears that read one input, with adapters of one rank and scale, neighbours in their slot.

    Attributes:
        weight: [out, in], the Linears' weights one below the other; with `input_first` [in, out], side by side.
        bias: [out] or None.
        widths: outputs of each Linear.
        adapters: of each, or None.
        first: number of the first of these Linears in the block.
    """

    weight: Tensor
    bias: Tensor | None
    widths: tuple[int, ...]
    adapters: tuple[AdapterColumns | None, ...]
    first: int
    input_first: bool = False

    def __post_init__(self) -> None:
        if len(self.widths) > MOST_LINEARS:
            raise ValueError(f"widths: found {len(self.widths)}, expected at most {MOST_LINEARS}")
        present = self.present
        for adapter in present:
            if not 1 <= adapter.rank <= MAX_RANK:
                raise ValueError(f"adapters: found rank {adapter.rank}, expected 1 to {MAX_RANK}")
            if not (adapter.trains_a and adapter.trains_b):
                raise ValueError("adapters: found a frozen factor, expected trains_a and trains_b of the whole block")
        for before, after in pairwise(present):
            if (after.rank, after.scale) != (before.rank, before.scale):
                raise ValueError("adapters: found different ranks or scales, expected one of each in a layer")
            if after.first_a != before.first_a + before.rank * self.inputs:
                raise ValueError("adapters: found gaps between the A of a layer, expected neighbours")

    @property
    def oriented(self) -> Tensor:
        """The weight as [out, in]."""
        return self.weight.T if self.input_first else self.weight

    @property
    def inputs(self) -> int:
        """Features of the input."""
        return self.oriented.shape[1]

    @cached_property
    def present(self) -> tuple[AdapterColumns, ...]:
        """The adapters that there are."""
        return tuple(adapter for adapter in self.adapters if adapter is not None)

    @property
    def rank(self) -> int:
        """The rank of each adapter; 0 if there are none."""
        return self.present[0].rank if self.present else 0

    @property
    def scale(self) -> float:
        """The factor of the low-rank products, alpha / rank; there must be an adapter."""
        return self.present[0].scale

    @property
    def members(self) -> list[int]:
        """Which of the Linears have an adapter."""
        return [member for member, adapter in enumerate(self.adapters) if adapter is not None]

    def lora_a(self, bank: Tensor) -> list[Tensor]:
        """Views [slots, rank, in] of each adapter's A in a bank [slots, slot size]."""
        length = self.rank * self.inputs
        return [bank.narrow(1, a.first_a, length).unflatten(1, (self.rank, self.inputs)) for a in self.present]

    def all_a(self, bank: Tensor) -> Tensor:
        """A view [slots, adapters * rank, in] of all A."""
        first, ranks = self.present[0].first_a, len(self.present) * self.rank
        return bank.narrow(1, first, ranks * self.inputs).unflatten(1, (ranks, self.inputs))

    def lora_b(self, bank: Tensor) -> list[Tensor]:
        """Views [slots, out, rank] of each adapter's B."""
        sized = zip(self.present, (self.widths[member] for member in self.members), strict=True)
        return [bank.narrow(1, b.first_b, width * b.rank).unflatten(1, (width, b.rank)) for b, width in sized]

    def by_member(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """[rows, out] of each Linear, from one tensor for each or one for all, side by side."""
        if len(outputs) == len(self.widths):
            return list(outputs)
        (joined,) = outputs
        return list(joined.split_with_sizes(self.widths, 1))

    def parts(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """(weight [out, in], bias) of each Linear."""
        biases = [None] * len(self.widths) if self.bias is None else self.bias.split_with_sizes(self.widths)
        yield from zip(self.oriented.split_with_sizes(self.widths), biases, strict=True)
