"""Rows of samples of which the last ones end: what follows reads only their first token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class EndingRows:
    """Tokens of samples, one after another, as rows of a matrix.

    Attributes:
        samples, tokens: how many, and how many each has.
        ending_groups, ending: how many of the last groups end, and how many samples these have.
    """

    samples: int
    tokens: int
    ending_groups: int
    ending: int

    @classmethod
    def of(cls, sizes: Sequence[int], tokens: int, ending_groups: int) -> EndingRows:
        """For groups of `sizes` rows."""
        ending = sum(sizes[len(sizes) - ending_groups :])
        return cls(sum(sizes) // tokens, tokens, ending_groups, ending // tokens)

    @property
    def going_on(self) -> int:
        """Samples that do not end."""
        return self.samples - self.ending

    def computed(self, rows: Tensor) -> Tensor:
        """Of [samples × tokens, ...] all rows of samples that go on, then the first row of each that ends."""
        if not self.ending:
            return rows
        first = rows.unflatten(0, (self.samples, self.tokens))[self.going_on :, 0]
        return torch.cat([rows[: self.going_on * self.tokens], first]) if self.going_on else first.contiguous()

    def parts(self, computed: Tensor) -> tuple[Tensor, Tensor]:
        """`computed` rows as [samples that go on, tokens, ...] and [samples that end, ...]."""
        on, first = computed.split([self.going_on * self.tokens, self.ending])
        return on.unflatten(0, (self.going_on, self.tokens)), first
