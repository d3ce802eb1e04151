"""Blocks of two families, a ViT's and a LLaMA's, of any size: frozen parts, attention, and places of the adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.kernels.cases import Sizes
from fedra_kernels import AdaptedLayer, AdapterColumns, Norm, StreamBlock

Draw = Callable[..., Tensor]
"""A frozen tensor of the shape given."""
SCALE = 0.5
"""Of the low-rank products."""
_EPS = 1e-6


@dataclass(frozen=True)
class BlockShape:
    """A pre-norm block.

    Attributes:
        width, hidden: features of the residual stream, and inside the MLP.
        heads, key_heads: of queries, and of keys and values, which have as many features each.
        gated: RMSNorm, SwiGLU and a causal attention, without biases; else LayerNorm and GELU.
        rank: of the adapters.
        scaled: with LayerScale.
        without: the numbers of the Linears without an adapter, in the order q, k, v, o, (gate,) and those of the MLP.
    """

    width: int
    hidden: int
    heads: int
    key_heads: int
    gated: bool
    rank: int
    scaled: bool = False
    without: tuple[int, ...] = ()

    @property
    def layers(self) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """(inputs, outputs of each Linear) of the layers."""
        keys = self.width // self.heads * self.key_heads
        first = (self.hidden, self.hidden) if self.gated else (self.hidden,)
        return (
            (self.width, (self.width, keys, keys)),
            (self.width, (self.width,)),
            (self.width, first),
            (self.hidden, (self.width,)),
        )

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of each Linear."""
        return [(inputs, width) for inputs, widths in self.layers for width in widths]

    @property
    def adapted(self) -> list[int]:
        """The numbers of the Linears with an adapter."""
        return [number for number in range(len(self.linears)) if number not in self.without]

    @property
    def slot_size(self) -> int:
        """Entries of a slot: all A, then all B."""
        return self.rank * sum(sum(self.linears[number]) for number in self.adapted)

    @property
    def first_b(self) -> int:
        """The column of a slot at which B begins."""
        return self.rank * sum(self.linears[number][0] for number in self.adapted)

    def block(self, draw: Draw) -> StreamBlock:
        """A block of frozen tensors that `draw` makes, matrices scaled by the root of their inputs."""
        places, layers, first = self._places(), [], 0
        for inputs, widths in self.layers:
            weight = draw(sum(widths), inputs).mul_(inputs**-0.5)
            bias = None if self.gated else draw(sum(widths))
            columns = tuple(places.get(first + member) for member in range(len(widths)))
            layers.append(AdaptedLayer(weight, bias, widths, columns, first))
            first += len(widths)
        norms = [
            Norm(draw(self.width), None, _EPS, "rms")
            if self.gated
            else Norm(draw(self.width), draw(self.width), _EPS, "layer")
            for _ in range(2)
        ]
        scales = [draw(self.width) if self.scaled else None for _ in range(2)]
        return StreamBlock(
            norm1=norms[0],
            attention_inputs=layers[0],
            attention_output=layers[1],
            scale1=scales[0],
            norm2=norms[1],
            mlp_inputs=layers[2],
            activation="swiglu" if self.gated else "gelu",
            mlp_output=layers[3],
            scale2=scales[1],
        )

    def attend(self, projected: Sequence[Tensor], tokens: int) -> Tensor:
        """Attention within every `tokens` rows: from queries, keys and values [rows, out] to [rows, width]."""
        queries, keys, values = (
            part.unflatten(0, (-1, tokens)).unflatten(2, (-1, self.width // self.heads)).transpose(1, 2)
            for part in projected
        )
        if self.key_heads < self.heads:
            repeats = self.heads // self.key_heads
            keys, values = (part.repeat_interleave(repeats, dim=1) for part in (keys, values))
        attended = F.scaled_dot_product_attention(queries, keys, values, is_causal=self.gated)
        return attended.transpose(1, 2).reshape(-1, self.width)

    def _places(self) -> dict[int, AdapterColumns]:
        """Where the adapters lie in a slot, by the number of their Linear."""
        lengths = [[self.rank * self.linears[number][side] for number in self.adapted] for side in (0, 1)]
        firsts = [accumulate([start, *of_side]) for start, of_side in zip((0, self.first_b), lengths, strict=True)]
        return {
            number: AdapterColumns(first_a, first_b, self.rank, SCALE)
            for number, first_a, first_b in zip(self.adapted, *firsts, strict=False)
        }


def vit_shape(sizes: Sizes) -> BlockShape:
    """A ViT's block at these sizes, with heads of 64 features."""
    heads = max(sizes.width // 64, 1)
    return BlockShape(sizes.width, sizes.hidden, heads, heads, gated=False, rank=sizes.rank)


def llama_shape(sizes: Sizes) -> BlockShape:
    """A LLaMA's block at these sizes, with heads of 128 features, of which four queries share keys and values."""
    heads = max(sizes.width // 128, 1)
    return BlockShape(sizes.width, sizes.hidden, heads, max(heads // 4, 1), gated=True, rank=sizes.rank)


def frozen_zeros(dtype: torch.dtype, device: torch.device) -> Draw:
    """Makes zeros."""
    return lambda *shape: torch.zeros(shape, dtype=dtype, device=device)
