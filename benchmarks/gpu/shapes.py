"""Transformers by their sizes, and the FLOPs that training one needs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass


@dataclass(frozen=True)
class ModelShape(ABC):
    """A transformer with adapters of one rank on all Linears, and how many different samples its clients see.

    Attributes:
        width, hidden: features of the residual stream and within the MLP.
        depth, heads: blocks, and heads of the queries.
        rank: of the adapters.
        pool: number of samples.
    """

    width: int = 768
    hidden: int = 3072
    depth: int = 12
    heads: int = 12
    rank: int = 16
    pool: int = 512

    @property
    @abstractmethod
    def tokens(self) -> int:
        """Tokens of a sample."""

    @property
    @abstractmethod
    def layers(self) -> tuple[tuple[int, int], ...]:
        """(inputs, outputs) of the Linears of a block, in their order."""

    def block_flops(self) -> float:
        """FLOPs of one sample in one block, forward and backward.

        Frozen products forward and dX, attention forward and twice that backward, low-rank products forward, and
        those of dX and of the factors' gradients.
        """
        frozen = 2.0 * self.tokens * sum(inputs * outputs for inputs, outputs in self.layers)
        low_rank = 2.0 * self.tokens * self.rank * sum(inputs + outputs for inputs, outputs in self.layers)
        return 2 * frozen + 3 * self._attention_flops() + 3 * low_rank

    def _attention_flops(self) -> float:
        return 4.0 * self.tokens**2 * self.width


@dataclass(frozen=True)
class VitShape(ModelShape):
    """A ViT."""

    image: int = 224
    patch: int = 16
    classes: int = 100

    @property
    def tokens(self) -> int:
        """Patches of an image, and the class token."""
        return (self.image // self.patch) ** 2 + 1

    @property
    def layers(self) -> tuple[tuple[int, int], ...]:
        """(inputs, outputs) of the Linears of a block: q, k, v, o, fc1, fc2."""
        square = (self.width, self.width)
        return square, square, square, square, (self.width, self.hidden), (self.hidden, self.width)


@dataclass(frozen=True)
class DecoderShape(ModelShape):
    """A causal language model with LLaMA's blocks; `length` tokens in every text, none of them padding."""

    key_heads: int = 12
    vocabulary: int = 32_000
    length: int = 2048

    @property
    def tokens(self) -> int:
        """Tokens of a text."""
        return self.length

    @property
    def layers(self) -> tuple[tuple[int, int], ...]:
        """(inputs, outputs) of the Linears of a block: q, k, v, o, gate, up, down."""
        square, shared = (self.width, self.width), (self.width, self.width * self.key_heads // self.heads)
        wide = (self.width, self.hidden)
        return square, shared, shared, square, wide, wide, (self.hidden, self.width)

    def _attention_flops(self) -> float:
        # Nothing is computed for later tokens.
        return super()._attention_flops() / 2


CAPACITIES = (12, 10, 8, 6, 4, 3)
"""Blocks that clients can hold, in turn (FedRA, §4)."""
VIT_BASE = VitShape()
LLAMA_8B = DecoderShape(width=4096, hidden=14_336, depth=32, heads=32, key_heads=8, vocabulary=128_256)
"""LLaMA 3 8B."""
SMALL_VIT = VitShape(width=128, hidden=256, depth=4, heads=4, image=32, patch=8, classes=10, rank=8, pool=64)
