"""Vision transformers by their sizes, and the FLOPs that training one needs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class VitShape:
    """A ViT, and how many different images its clients see."""

    width: int = 768
    hidden: int = 3072
    depth: int = 12
    heads: int = 12
    image: int = 224
    patch: int = 16
    classes: int = 100
    rank: int = 16
    pool: int = 512

    @property
    def tokens(self) -> int:
        """Patches of an image, and the class token."""
        return (self.image // self.patch) ** 2 + 1

    @property
    def layers(self) -> tuple[tuple[int, int], ...]:
        """(inputs, outputs) of the Linears of a block: q, k, v, o, fc1, fc2."""
        square = (self.width, self.width)
        return square, square, square, square, (self.width, self.hidden), (self.hidden, self.width)

    def block_flops(self) -> float:
        """FLOPs of one image in one block, forward and backward.

        Frozen products forward and dX, attention forward and twice that backward, low-rank products forward, and
        those of dX and of the factors' gradients.
        """
        frozen = 2.0 * self.tokens * sum(inputs * outputs for inputs, outputs in self.layers)
        low_rank = 2.0 * self.tokens * self.rank * sum(inputs + outputs for inputs, outputs in self.layers)
        return 2 * frozen + 3 * self._attention_flops() + 3 * low_rank

    def _attention_flops(self) -> float:
        return 4.0 * self.tokens**2 * self.width


CAPACITIES = (12, 10, 8, 6, 4, 3)
"""Blocks that clients can hold, in turn (FedRA, §4)."""
VIT_BASE = VitShape()
SMALL_VIT = VitShape(width=128, hidden=256, depth=4, heads=4, image=32, patch=8, classes=10, rank=8, pool=64)
