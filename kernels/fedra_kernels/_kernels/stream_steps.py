"""The steps of a block on the residual stream, as both paths take them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ..dropout import Dropout
from ..groups import RowGroups
from .adapted_layer import AdaptedLayer
from .norm import Norm

Activation = Literal["gelu", "gelu_tanh", "swiglu"]
Outputs = Sequence[Tensor]
"""Of a layer, or their gradients: a tensor [rows, out] for each of its Linears, or one with all side by side."""
Shrunk = list[Tensor]
"""S = drop(x) A_k^T of a layer's adapters, in the form of the path that made it; empty without adapters."""


@dataclass(frozen=True)
class StreamRows:
    """Rows of the residual stream or of its gradient.

    Attributes:
        matrix: [rows, features], all rows of the stream.
        index: int64, which rows, each once; None for all.
    """

    matrix: Tensor
    index: Tensor | None = None

    def read(self) -> Tensor:
        """The rows, one after another; `matrix` itself where these are all."""
        return self.matrix if self.index is None else self.matrix.index_select(0, self.index)

    def write(self, rows: Tensor) -> Tensor:
        """Overwrite the rows, and return the matrix."""
        return self.matrix.copy_(rows) if self.index is None else self.matrix.index_copy_(0, self.index, rows)


@dataclass(frozen=True)
class NormedRows:
    """Rows that a norm has read, from which their norm can be computed again.

    Attributes:
        rows: [rows, features].
        mean, inverse: [rows], means (0 for RMSNorm) and inverse deviations.
        norm: which has read them.
    """

    rows: Tensor
    mean: Tensor
    inverse: Tensor
    norm: Norm


@dataclass(frozen=True)
class StreamSteps(ABC):
    """A block's steps in one pass, forward and backward.

    Rows are those of the clients that hold the block, one client after another.

    Attributes:
        bank: [slots, slot size], the adapters.
        gradients: shaped as `bank`; `finish` has added to it. None for no gradients.
        trains_a, trains_b: whether A and B get gradients.
        groups: the slot of each row.
        dropout: LoRA dropout of each Linear of the block, or empty.
        first_b: the column of a slot at which the first B begins; all A lie before it.
    """

    bank: Tensor
    gradients: Tensor | None
    trains_a: bool
    trains_b: bool
    groups: RowGroups
    dropout: Sequence[Dropout | None]
    first_b: int

    def dropouts(self, layer: AdaptedLayer) -> list[Dropout | None]:
        """The dropout of each adapter of a layer."""
        if not self.dropout:
            return [None] * len(layer.present)
        return [self.dropout[layer.first + member] for member in layer.members]

    def scale(self, layer: AdaptedLayer) -> float:
        """The factor of a layer's low-rank products, divided by 1 - p with dropout."""
        dropout = next(iter(self.dropouts(layer)), None)
        return layer.scale if dropout is None else layer.scale / (1.0 - dropout.p)

    @abstractmethod
    def normalize(self, source: StreamRows, norm: Norm, reader: AdaptedLayer) -> tuple[Tensor, NormedRows, Shrunk]:
        """The norm of the rows, what backward needs, and the reader's S."""

    @abstractmethod
    def product(self, x: Tensor, layer: AdaptedLayer, shrunk: Shrunk) -> Outputs:
        """The layer's outputs for x, with adapters."""

    @abstractmethod
    def add_product(
        self,
        x: Tensor,
        layer: AdaptedLayer,
        shrunk: Shrunk | None,
        residual: StreamRows,
        column_scale: Tensor | None,
        out: StreamRows | None = None,
    ) -> tuple[Tensor, Shrunk]:
        """residual + column_scale · (the layer's outputs), and S, which is made if it is None.

        The result is new, or the matrix of `out`, whose rows are overwritten.
        """

    @abstractmethod
    def activate(self, wide: Outputs, kind: Activation, reader: AdaptedLayer) -> tuple[Tensor, Shrunk]:
        """The activation of the outputs `wide`, with `swiglu` those of gate and up, and the reader's S."""

    @abstractmethod
    def output_gradient(
        self,
        grads: Outputs,
        layer: AdaptedLayer,
        shrunk: Shrunk,
        index: Tensor | None = None,
        column_scale: Tensor | None = None,
    ) -> tuple[Outputs, Shrunk]:
        """dS of a layer from the gradients of its outputs; also sums up dB.

        With `index` or `column_scale`, `grads` is one tensor, whose rows `index` are the gradients, times
        `column_scale`.

        Returns:
            the gradients of the outputs, and dS = scale · dY · B.
        """

    @abstractmethod
    def input_gradient(self, grads: Outputs, layer: AdaptedLayer, grad_shrunk: Shrunk) -> Tensor:
        """dX [rows, in] from the gradients of a layer's outputs, as `output_gradient` returned them, and dS."""

    @abstractmethod
    def factor_gradient(self, x: Tensor | NormedRows, layer: AdaptedLayer, grad_shrunk: Shrunk) -> None:
        """Sum up dA of a layer that has read x, or the norm of rows."""

    @abstractmethod
    def activation_gradient(
        self, grad_y: Tensor, wide: Outputs, kind: Activation, reader: AdaptedLayer, grad_shrunk: Shrunk
    ) -> Outputs:
        """The gradients of `wide`; dA of the reader, which has read the activation, is summed up."""

    def mlp_gradient(
        self,
        grad_y: Tensor,
        wide: Outputs,
        kind: Activation,
        reader: AdaptedLayer,
        grad_shrunk: Shrunk,
        layer: AdaptedLayer,
        shrunk: Shrunk,
        normed: NormedRows,
    ) -> Tensor:
        """From the gradient of the activation y to that of the input of the `layer` that has made `wide`.

        dA of both layers and dB of `layer` are summed up.

        Args:
            reader, grad_shrunk: the layer that has read y, and its dS.
            shrunk: S of `layer`, which has read the norm of the rows of `normed`.
        """
        grad_wide = self.activation_gradient(grad_y, wide, kind, reader, grad_shrunk)
        _, of_layer = self.output_gradient(grad_wide, layer, shrunk)
        self.factor_gradient(normed, layer, of_layer)
        return self.input_gradient(grad_wide, layer, of_layer)

    @abstractmethod
    def norm_gradient(
        self, grad_x: Tensor, normed: NormedRows, residual: StreamRows, out: StreamRows | None = None
    ) -> Tensor:
        """residual + the gradient of the rows that a norm has read; `out` as in `add_product`."""

    @abstractmethod
    def finish(self) -> None:
        """Add what was summed up to the gradients."""
