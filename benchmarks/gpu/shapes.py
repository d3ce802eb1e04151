"""Vision transformers by their sizes, and what a training step of one needs: FLOPs and bytes, counted."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.kernels.work import Pass, Peaks, Work, lora_backward, lora_forward

_BF16, _FLOAT = 2, 4


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

    def block_work(self, images: float, clients: float) -> Work:
        """What one block's step of `images` of `clients` cannot do without, in bf16 with float32 adapters.

        The fused block: norms and activations make S for the layers that read them, the output projection makes its
        own. Passes of the optimizer (AdamW) are counted for the block's slots.
        """
        rows = images * self.tokens
        wide, thin = _BF16 * rows * self.width, _BF16 * rows * self.hidden
        passes: list[Pass] = []
        for number, (inputs, outputs) in enumerate(self.layers):
            size = (round(rows), inputs, outputs, self.rank, round(clients), _BF16)
            passes += lora_forward(*size, given=number != 3).passes + lora_backward(*size).passes
        attention = self._attention_flops() * images
        passes += [Pass(attention, 4 * wide), Pass(2 * attention, 8 * wide)]
        # Two norms (whose gathered rows are kept) and backward, the activation, two residual sums and their gradients.
        passes += [Pass(0.0, moved) for moved in (6 * wide, 10 * wide, 2 * thin, 3 * thin, 6 * wide, 4 * wide)]
        slot = self.rank * sum(inputs + outputs for inputs, outputs in self.layers)
        return Work((*passes, Pass(0.0, 7.0 * _FLOAT * clients * slot)))

    def _attention_flops(self) -> float:
        return 4.0 * self.tokens**2 * self.width


CAPACITIES = (12, 10, 8, 6, 4, 3)
"""Blocks that clients can hold, in turn (FedRA, §4)."""
VIT_BASE = VitShape()
SMALL_VIT = VitShape(width=128, hidden=256, depth=4, heads=4, image=32, patch=8, classes=10, rank=8, pool=64)


def expected_step_seconds(shape: VitShape, *, lanes: int, images: int, held: float, peaks: Peaks) -> float:
    """A training step of `lanes` clients with `images` each, of which a block meets the share `held`."""
    clients = lanes * held
    return shape.depth * shape.block_work(clients * images, clients).seconds(peaks)


def expected_clients_per_second(shape: VitShape, *, lanes: int, images: int, steps: int, peaks: Peaks) -> float:
    """Clients of FedRA's capacities that are trained a second, each for so many steps."""
    held = sum(min(capacity, shape.depth) for capacity in CAPACITIES) / (len(CAPACITIES) * shape.depth)
    return lanes / (steps * expected_step_seconds(shape, lanes=lanes, images=images, held=held, peaks=peaks))
