"""The frozen parts of a block on the residual stream."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import get_args

from torch import Tensor

from .adapted_layer import AdaptedLayer
from .checks import check_like, check_shape
from .norm import Norm
from .stream_steps import Activation


@dataclass(frozen=True)
class StreamBlock:
    """The frozen parts of a block: x += scale1 · attention(norm1(x)); x += scale2 · mlp(norm2(x)).

    Attributes:
        norm1, norm2: the norms before attention and MLP.
        attention_inputs: the Linears that read the first norm, such as query, key and value.
        attention_output: the attention's last Linear.
        scale1, scale2: LayerScale [features], or None for 1.
        mlp_inputs: the Linear that reads the second norm; with `swiglu` two, gate and up.
        activation: between them and `mlp_output`.
        mlp_output: the MLP's last Linear.

    Raises:
        ValueError: a shape, dtype or device of the parts does not fit the others'.
    """

    norm1: Norm
    attention_inputs: AdaptedLayer
    attention_output: AdaptedLayer
    scale1: Tensor | None
    norm2: Norm
    mlp_inputs: AdaptedLayer
    activation: Activation
    mlp_output: AdaptedLayer
    scale2: Tensor | None

    @property
    def layers(self) -> tuple[AdaptedLayer, ...]:
        """All layers, in the order of the Linears whose dropout is given."""
        return self.attention_inputs, self.attention_output, self.mlp_inputs, self.mlp_output

    @cached_property
    def first_b(self) -> int:
        """The column of a slot at which the first B begins; 0 without adapters."""
        return min((adapter.first_b for layer in self.layers for adapter in layer.present), default=0)

    @cached_property
    def slot_size(self) -> int:
        """Entries of a slot of the bank: all A, then all B."""
        return max((end for _, end in self._factors), default=0)

    @cached_property
    def _factors(self) -> list[tuple[int, int]]:
        """The columns of each factor, from the first to behind the last, in order."""
        found = []
        for layer in self.layers:
            for member, adapter in zip(layer.members, layer.present, strict=True):
                found.append((adapter.first_a, adapter.first_a + adapter.rank * layer.inputs))
                found.append((adapter.first_b, adapter.first_b + adapter.rank * layer.widths[member]))
        return sorted(found)

    def __post_init__(self) -> None:
        if self.activation not in get_args(Activation):
            raise ValueError(
                f"activation: found {self.activation!r}, expected one of {', '.join(get_args(Activation))}"
            )
        check_shape("norm1.weight", self.norm1.weight, (None,))
        (width,) = self.norm1.weight.shape
        hidden = self.mlp_output.inputs
        outputs = (hidden, hidden) if self.activation == "swiglu" else (hidden,)
        if self.mlp_inputs.widths != outputs:
            raise ValueError(f"mlp_inputs: found outputs {list(self.mlp_inputs.widths)}, expected {list(outputs)}")
        for last in (self.attention_output, self.mlp_output):
            if last.widths != (width,):
                raise ValueError(f"outputs of the last Linears: found {list(last.widths)}, expected [{width}]")
        expected: dict[str, tuple[Tensor | None, tuple[int | None, ...]]] = {
            f"{name}.{part}": (getattr(norm, part), (width,))
            for name, norm in (("norm1", self.norm1), ("norm2", self.norm2))
            for part in ("weight", "bias")
        }
        expected |= {"scale1": (self.scale1, (width,)), "scale2": (self.scale2, (width,))}
        layers = ("attention_inputs", width), ("attention_output", None), ("mlp_inputs", width), ("mlp_output", hidden)
        for name, inputs in layers:
            layer: AdaptedLayer = getattr(self, name)
            expected[f"{name}.weight"] = (layer.oriented, (sum(layer.widths), inputs))
            expected[f"{name}.bias"] = (layer.bias, (sum(layer.widths),))
        for name, (tensor, shape) in expected.items():
            if tensor is not None:
                check_shape(name, tensor, shape)
                check_like(name, tensor, "norm1.weight", self.norm1.weight)
        ends = [0, *(end for _, end in self._factors)]
        if ends[:-1] != [first for first, _ in self._factors]:
            raise ValueError("adapters: found factors of a slot with gaps or overlaps, expected neighbours")
        if any(adapter.first_a > self.first_b for layer in self.layers for adapter in layer.present):
            raise ValueError("adapters: found an A of a slot behind a B, expected all A, then all B")
