"""Which rows a block computes after its attention: all tokens of most samples, the first token of the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ComputedRows:
    """Tokens of samples, one after another, as rows of a matrix; of the last samples only the first token is computed.

    Attributes:
        samples, tokens: how many samples there are, and how many tokens each has.
        first_token_groups, first_token_samples: of how many of the last groups, and of their samples, only the first
            token is computed.
    """

    samples: int
    tokens: int
    first_token_groups: int
    first_token_samples: int

    @classmethod
    def of(cls, sizes: Sequence[int], tokens: int, first_token_groups: int) -> ComputedRows:
        """For groups of `sizes` rows."""
        rows = sum(sizes[len(sizes) - first_token_groups :])
        return cls(sum(sizes) // tokens, tokens, first_token_groups, rows // tokens)

    @property
    def full_samples(self) -> int:
        """Samples of which all tokens are computed."""
        return self.samples - self.first_token_samples

    def select(self, rows: Tensor) -> Tensor:
        """The computed rows of [samples × tokens, ...]: all of full samples, then the first of each other sample."""
        if not self.first_token_samples:
            return rows
        first = rows.unflatten(0, (self.samples, self.tokens))[self.full_samples :, 0]
        return torch.cat([rows[: self.full_samples * self.tokens], first]) if self.full_samples else first.contiguous()

    def split(self, computed: Tensor) -> tuple[Tensor, Tensor]:
        """`computed` rows as [full samples, tokens, ...] and [other samples, ...]."""
        full, first = computed.split([self.full_samples * self.tokens, self.first_token_samples])
        return full.unflatten(0, (self.full_samples, self.tokens)), first

    def put(self, hidden: Tensor, samples: Tensor | None, computed: Tensor) -> Tensor:
        """`hidden` [..., tokens, features], with the `computed` rows in its `samples`; None for all."""
        full, first = self.split(computed)
        if not self.first_token_samples:
            return full if samples is None else hidden.index_copy(0, samples, full)
        if samples is None:
            out = hidden.clone()
            out[: self.full_samples] = full
            out[self.full_samples :, 0] = first
            return out
        out = hidden.index_copy(0, samples[: self.full_samples], full)
        out[:, 0].index_copy_(0, samples[self.full_samples :], first)
        return out

    def add_residual(self, grad: Tensor, held: Tensor, computed: Tensor) -> None:
        """Add to `grad` [samples, tokens, ...] the `computed` rows, and rows of `held` where nothing was computed."""
        full, first = self.split(computed)
        grad[: self.full_samples] += full
        if self.first_token_samples:
            grad[self.full_samples :, 0] += first
            grad[self.full_samples :, 1:] += held[self.full_samples :, 1:]
