"""The steps of a block on the residual stream by Triton kernels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..dropout import Dropout
from .activation import activation_forward, activation_tile
from .activation_gradient import activation_gradient
from .adapted_layer import AdaptedLayer
from .configs import NARROW_RANK, gradient_chunk
from .gather_norm import gather_norm_backward, gather_norm_forward, norm_tile
from .lora_gemm import gemm_tile, lora_gemm, lora_gemm_onto
from .lora_grad_outer import lora_grad_outer
from .lora_grad_output import lora_grad_output
from .lora_grad_reduce import lora_grad_reduce
from .lora_shrink import lora_shrink, shrink_tile
from .lora_single_pass import lora_single_pass, lora_single_pass_onto, single_pass_tile
from .norm import Norm
from .row_tables import Chunks
from .stream_steps import Activation, NormedRows, Outputs, Shrunk, StreamRows, StreamSteps


@dataclass(frozen=True)
class TritonSteps(StreamSteps):
    """On a GPU. `Shrunk` is S [rows, adapters * rank] of a layer, in one tensor.

    The sums for the gradients are those of each chunk of rows, fp32 [chunks, trained columns of a slot], laid out as
    the slots are; one launch adds them all.
    """

    def normalize(self, source: StreamRows, norm: Norm, reader: AdaptedLayer) -> tuple[Tensor, NormedRows, Shrunk]:
        fused = reader.present and reader.rank <= NARROW_RANK
        banks = reader.lora_a(self.bank) if fused else []
        chunks = self.groups.chunks(norm_tile(source.matrix, banks).rows).rows if fused else None
        keys, threshold = self._keys(reader) if fused else ([], 0)
        x, rows, mean, inverse, shrunk = gather_norm_forward(
            source.matrix, source.index, norm.weight, norm.bias, norm.eps, norm.kind == "rms",
            banks, chunks, keys, threshold,
        )  # fmt: skip
        normed = NormedRows(source.matrix if source.index is None else rows, mean, inverse, norm)
        return x, normed, [shrunk] if fused else self._shrink(x, reader)

    def product(self, x: Tensor, layer: AdaptedLayer, shrunk: Shrunk) -> Outputs:
        if not shrunk:
            return [F.linear(x, layer.oriented, layer.bias)]
        return [lora_gemm(*self._gemm_arguments(x, layer, shrunk[0]))]

    def add_product(
        self,
        x: Tensor,
        layer: AdaptedLayer,
        shrunk: Shrunk | None,
        residual: StreamRows,
        column_scale: Tensor | None,
        out: StreamRows | None = None,
    ) -> tuple[Tensor, Shrunk]:
        if not layer.present:
            rows, (y,) = residual.read(), self.product(x, layer, [])
            total = y.add_(rows) if column_scale is None else torch.addcmul(rows, y, column_scale)
            return (total if out is None else out.write(total)), []
        beside = residual.matrix, residual.index, column_scale
        single = shrunk is None and layer.rank <= NARROW_RANK and not self.dropout and len(layer.widths) == 1
        if single:
            spans = self.groups.spans(single_pass_tile(x, layer.rank).rows)
            (lora_a,), (lora_b,) = layer.lora_a(self.bank), layer.lora_b(self.bank)
            weight, scale = layer.oriented, self.scale(layer)
            arguments = x, weight, layer.bias, lora_a, lora_b, spans, self.groups.filled, scale, *beside
            if out is None:
                y, made = lora_single_pass(*arguments)
                return y, [made]
            return out.matrix, [lora_single_pass_onto(out.matrix, out.index, *arguments)]
        shrunk = self._shrink(x, layer) if shrunk is None else shrunk
        gemm: tuple[Any, ...] = *self._gemm_arguments(x, layer, shrunk[0]), *beside
        if out is None:
            return lora_gemm(*gemm), shrunk
        lora_gemm_onto(out.matrix, out.index, *gemm)
        return out.matrix, shrunk

    def activate(self, wide: Outputs, kind: Activation, reader: AdaptedLayer) -> tuple[Tensor, Shrunk]:
        x, up = _halves(wide, kind)
        fused = reader.present and reader.rank <= NARROW_RANK
        lora_a = reader.lora_a(self.bank)[0] if fused else None
        chunks = self.groups.chunks(activation_tile(x, lora_a).rows).rows if fused else None
        keys, threshold = self._keys(reader) if fused else ([], 0)
        y, *shrunk = activation_forward(kind, x, up, lora_a, chunks, keys[0] if keys else None, threshold)
        return y, shrunk if fused else self._shrink(y, reader)

    def output_gradient(
        self,
        grads: Outputs,
        layer: AdaptedLayer,
        shrunk: Shrunk,
        index: Tensor | None = None,
        column_scale: Tensor | None = None,
    ) -> tuple[Outputs, Shrunk]:
        gathers = index is not None or column_scale is not None
        if not layer.present or layer.rank > NARROW_RANK:
            if gathers:
                grads = [_gather(grads[0], index, column_scale)]
            return grads, self._wide_output_gradient(grads, layer, shrunk)
        of_members = layer.by_member(grads)
        adapted = [of_members[member] for member in layer.members]
        partials = self._partials if self._trains(layer.present[0].first_b) else None
        columns = [self._column(adapter.first_b) for adapter in layer.present]
        grad_shrunk, gathered = lora_grad_output(
            adapted, layer.lora_b(self.bank), shrunk[0], self._chunks.rows, partials, columns, self.scale(layer),
            index, column_scale,
        )  # fmt: skip
        return [gathered] if gathers else grads, [grad_shrunk]

    def input_gradient(self, grads: Outputs, layer: AdaptedLayer, grad_shrunk: Shrunk) -> Tensor:
        ranks = layer.rank if self.dropout else layer.rank * len(layer.present)
        spans = self.groups.spans(gemm_tile(grads[0], ranks).rows) if grad_shrunk else None
        if spans is not None and not self.dropout:
            return lora_gemm(
                list(grads), layer.oriented, None, grad_shrunk[0], [layer.all_a(self.bank)], [layer.inputs], spans,
                self.groups.filled, None, transposed=True,
            )  # fmt: skip
        of_members = layer.by_member(grads)
        total: Tensor | None = None
        places = {member: number for number, member in enumerate(layer.members)}
        for member, (grad, (weight, _)) in enumerate(zip(of_members, layer.parts(), strict=True)):
            if member not in places:
                total = grad @ weight if total is None else total.addmm_(grad, weight)
                continue
            number = places[member]
            keys, threshold = self._keys(layer)
            narrow = grad_shrunk[0][:, number * layer.rank : (number + 1) * layer.rank].contiguous()
            assert spans is not None
            total = lora_gemm(
                [grad.contiguous()], weight, None, narrow, [layer.lora_a(self.bank)[number]], [layer.inputs], spans,
                self.groups.filled, None, keys[number], threshold, True, total,
            )  # fmt: skip
        assert total is not None
        return total

    def factor_gradient(self, x: Tensor | NormedRows, layer: AdaptedLayer, grad_shrunk: Shrunk) -> None:
        if grad_shrunk:
            self._factor_gradient(x, layer, grad_shrunk[0], 1.0)

    def _factor_gradient(self, x: Tensor | NormedRows, layer: AdaptedLayer, grad_shrunk: Tensor, scale: float) -> None:
        """`factor_gradient` from scale * `grad_shrunk`."""
        if not self._trains(layer.present[0].first_a):
            return
        moments = () if isinstance(x, Tensor) else (x.mean, x.inverse, x.norm.weight, x.norm.bias)
        rows = x if isinstance(x, Tensor) else x.rows
        together = not self.dropout and layer.rank <= NARROW_RANK
        keys, threshold = self._keys(layer)
        for number in range(1 if together else len(layer.present)):
            ranks = layer.rank * len(layer.present) if together else layer.rank
            lora_grad_outer(
                rows, grad_shrunk, self._chunks.rows, self._partials, self._column(layer.present[number].first_a),
                number * layer.rank, ranks, True, scale, keys[number] if keys else None, threshold, *moments,
            )  # fmt: skip

    def activation_gradient(
        self, grad_y: Tensor, wide: Outputs, kind: Activation, reader: AdaptedLayer, grad_shrunk: Shrunk
    ) -> Outputs:
        return self._activation_gradient(grad_y, wide, kind, reader, grad_shrunk, None, [])

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
        arguments = grad_y, wide, kind, reader, grad_shrunk, layer, shrunk
        if kind == "swiglu" or not layer.present or layer.rank > NARROW_RANK or self.dropout:
            return super().mlp_gradient(*arguments, normed)
        # dB is summed up while the gradient of `wide` is made, and dS while it is read for dX: it is not read for them.
        (of_wide,) = self._activation_gradient(*arguments)
        spans = self.groups.spans(single_pass_tile(of_wide, layer.rank).rows)
        (lora_a,), (lora_b,) = layer.lora_a(self.bank), layer.lora_b(self.bank)
        grad_x, of_layer = lora_single_pass(
            of_wide, layer.oriented.T, None, lora_b.transpose(1, 2), lora_a.transpose(1, 2), spans,
            self.groups.filled, self.scale(layer), None, None, None,
        )  # fmt: skip
        self._factor_gradient(normed, layer, of_layer, self.scale(layer))
        return grad_x

    def _activation_gradient(
        self,
        grad_y: Tensor,
        wide: Outputs,
        kind: Activation,
        reader: AdaptedLayer,
        grad_shrunk: Shrunk,
        layer: AdaptedLayer | None,
        shrunk: Shrunk,
    ) -> Outputs:
        """The gradients of `wide`; sums up dA of the reader, and dB of the `layer` that has made `wide`, if any."""
        grad_wide = [torch.empty_like(part) for part in wide]
        (x, up), (grad_x, grad_up) = _halves(wide, kind), _halves(grad_wide, kind)
        trains_a = bool(reader.present) and self._trains(reader.present[0].first_a)
        trains_b = layer is not None and self._trains(layer.present[0].first_b)
        keys, threshold = self._keys(reader)
        activation_gradient(
            kind, grad_y, x, up, grad_x, grad_up, self._chunks.rows, self._partials if trains_a or trains_b else None,
            grad_shrunk[0] if trains_a else None, self._column(reader.present[0].first_a) if trains_a else 0,
            keys[0] if keys and trains_a else None, threshold,
            shrunk[0] if trains_b else None,
            self._column(layer.present[0].first_b) if layer is not None and trains_b else 0,
            1.0 if layer is None else self.scale(layer),
        )  # fmt: skip
        return grad_wide

    def norm_gradient(
        self, grad_x: Tensor, normed: NormedRows, residual: StreamRows, out: StreamRows | None = None
    ) -> Tensor:
        out = StreamRows(grad_x.new_empty(grad_x.shape)) if out is None else out
        norm = normed.norm
        gather_norm_backward(
            grad_x, norm.weight, normed.rows, normed.mean, normed.inverse, norm.kind == "rms",
            residual.matrix, residual.index, out.matrix, out.index,
        )  # fmt: skip
        return out.matrix

    def finish(self) -> None:
        start, end = self._trained_columns
        if self.gradients is not None and end > start:
            lora_grad_reduce(self._partials, self._chunks.groups, self.gradients[:, start:end], None)

    @cached_property
    def _chunks(self) -> Chunks:
        return self.groups.chunks(gradient_chunk(self.bank))

    @cached_property
    def _partials(self) -> Tensor:
        start, end = self._trained_columns
        return self.bank.new_empty(self._chunks.rows.shape[0], end - start, dtype=torch.float32)

    @cached_property
    def _trained_columns(self) -> tuple[int, int]:
        """The columns of a slot that get gradients: all A lie before all B."""
        # An A lies before the first B: without an adapter there is nothing to train.
        if self.gradients is None or self.first_b == 0:
            return 0, 0
        return 0 if self.trains_a else self.first_b, self.bank.shape[1] if self.trains_b else self.first_b

    def _trains(self, column: int) -> bool:
        """Whether the factor that begins at a slot's column gets gradients."""
        start, end = self._trained_columns
        return start <= column < end

    def _column(self, column: int) -> int:
        """A slot's column among those that get gradients."""
        return column - self._trained_columns[0]

    def _keys(self, layer: AdaptedLayer) -> tuple[list[Tensor], int]:
        """The keys of each adapter's dropout, none without, and the threshold of all."""
        dropouts: list[Dropout] = [drop for drop in self.dropouts(layer) if drop is not None]
        return [drop.keys for drop in dropouts], dropouts[0].threshold if dropouts else 0

    def _shrink(self, x: Tensor, layer: AdaptedLayer) -> Shrunk:
        if not layer.present:
            return []
        pieces = self.groups.chunks(shrink_tile(x, layer.rank).rows).rows
        keys, threshold = self._keys(layer)
        parts = [
            lora_shrink(x, lora_a, pieces, 1.0, keys[number] if keys else None, threshold, False)
            for number, lora_a in enumerate(layer.lora_a(self.bank))
        ]
        return [parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)]

    def _gemm_arguments(self, x: Tensor, layer: AdaptedLayer, shrunk: Tensor) -> tuple[Any, ...]:
        """The arguments of `lora_gemm` for a layer's outputs, but for what it may be added to."""
        factors = iter(layer.lora_b(self.bank))
        expand = [None if adapter is None else next(factors) for adapter in layer.adapters]
        spans = self.groups.spans(gemm_tile(x, layer.rank).rows)
        return (
            [x], layer.oriented, layer.bias, shrunk, expand, list(layer.widths), spans, self.groups.filled,
            self.scale(layer), None, 0, False,
        )  # fmt: skip

    def _wide_output_gradient(self, grads: Outputs, layer: AdaptedLayer, shrunk: Shrunk) -> Shrunk:
        """dS, and dB summed up, of a layer with adapters of a high rank."""
        if not layer.present:
            return []
        of_members = layer.by_member(grads)
        pieces = self.groups.chunks(shrink_tile(grads[0], layer.rank).rows).rows
        parts = []
        factors = layer.lora_b(self.bank)
        for number, (member, adapter) in enumerate(zip(layer.members, layer.present, strict=True)):
            grad = of_members[member].contiguous()
            parts.append(lora_shrink(grad, factors[number], pieces, self.scale(layer), None, 0, True))
            if self._trains(adapter.first_b):
                lora_grad_outer(
                    grad, shrunk[0], self._chunks.rows, self._partials, self._column(adapter.first_b),
                    number * layer.rank, layer.rank, False, self.scale(layer),
                )  # fmt: skip
        return [parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)]


def _halves(wide: Outputs, kind: Activation) -> tuple[Tensor, Tensor | None]:
    """Gate and up, which lie side by side; without a gate, the one output and None."""
    (joined,) = wide
    if kind != "swiglu":
        return joined, None
    gate, up = joined.chunk(2, dim=1)
    return gate, up


def _gather(grad: Tensor, index: Tensor | None, column_scale: Tensor | None) -> Tensor:
    rows = StreamRows(grad, index).read()
    return rows if column_scale is None else rows * column_scale
