"""The steps of a block on the residual stream in torch, on a CPU: small products are batched over runs of clients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..dropout import keep_mask
from ..groups import Run, add_to_bank, bank_rows, grouped
from . import lora_torch
from .adapted_layer import AdaptedLayer
from .norm import Norm
from .stream_steps import Activation, NormedRows, Outputs, Shrunk, StreamRows, StreamSteps


@dataclass(frozen=True)
class TorchSteps(StreamSteps):
    """On a CPU. `Shrunk` has S of each adapter, then, with dropout, what is kept of x, bool [rows, in], for each."""

    def normalize(self, source: StreamRows, norm: Norm, reader: AdaptedLayer) -> tuple[Tensor, NormedRows, Shrunk]:
        rows = source.read()
        if norm.kind == "layer":
            x, mean, inverse = torch.native_layer_norm(rows, rows.shape[1:], norm.weight, norm.bias, norm.eps)
            mean, inverse = mean[:, 0], inverse[:, 0]
        else:
            exact = torch.promote_types(rows.dtype, torch.float32)
            squares = torch.linalg.vector_norm(rows, dim=1, dtype=exact).square_()
            inverse = torch.rsqrt(squares.div_(rows.shape[1]).add_(norm.eps))
            mean = torch.zeros_like(inverse)
            x = _scaled(rows, inverse, norm)
        return x, NormedRows(rows, mean, inverse, norm), self._shrink(x, reader)

    def product(self, x: Tensor, layer: AdaptedLayer, shrunk: Shrunk) -> Outputs:
        # Batched products would copy parts of something wider that are in bfloat16.
        outputs = [F.linear(x, weight, bias) for weight, bias in layer.parts()]
        for member, s, lora_b in zip(layer.members, shrunk, layer.lora_b(self.bank), strict=False):
            lora_torch.expand(outputs[member], s, lora_b, self.groups, self.scale(layer))
        return outputs

    def add_product(
        self,
        x: Tensor,
        layer: AdaptedLayer,
        shrunk: Shrunk | None,
        residual: StreamRows,
        column_scale: Tensor | None,
        out: StreamRows | None = None,
    ) -> tuple[Tensor, Shrunk]:
        shrunk = self._shrink(x, layer) if shrunk is None else shrunk
        (y,) = self.product(x, layer, shrunk)
        if column_scale is not None:
            y.mul_(column_scale)
        if out is not None and out.index is None:
            return torch.add(y, residual.read(), out=out.matrix), shrunk
        y.add_(residual.read())
        return (y if out is None else out.write(y)), shrunk

    def activate(self, wide: Outputs, kind: Activation, reader: AdaptedLayer) -> tuple[Tensor, Shrunk]:
        y = _activation(wide, kind)
        return y, self._shrink(y, reader)

    def output_gradient(
        self,
        grads: Outputs,
        layer: AdaptedLayer,
        shrunk: Shrunk,
        index: Tensor | None = None,
        column_scale: Tensor | None = None,
    ) -> tuple[Outputs, Shrunk]:
        if index is not None:
            grads = [grad.index_select(0, index) for grad in grads]
        if column_scale is not None:
            grads = [grad * column_scale for grad in grads]
        of_members = layer.by_member(grads)
        grad_shrunk: Shrunk = []
        sinks = None if self.gradients is None or not self.trains_b else layer.lora_b(self.gradients)
        for number, (member, lora_b) in enumerate(zip(layer.members, layer.lora_b(self.bank), strict=True)):
            grad = of_members[member]
            narrow = grad.new_empty(len(grad), layer.rank)
            for run in self.groups.runs:
                part = grouped(grad, run)
                if sinks is not None:
                    scaled = lora_torch.rank_major(shrunk[number], run) * self.scale(layer)
                    add_to_bank(sinks[number], run.slots, torch.bmm(scaled, part).transpose(1, 2))
                factor = bank_rows(lora_b, run.slots).transpose(1, 2)
                target = lora_torch.rank_major(narrow, run)
                torch.bmm(factor, part.transpose(1, 2), out=target).mul_(self.scale(layer))
            grad_shrunk.append(narrow)
        return grads, [*grad_shrunk, *shrunk[len(layer.members) :]]

    def input_gradient(self, grads: Outputs, layer: AdaptedLayer, grad_shrunk: Shrunk) -> Tensor:
        parts = zip(layer.by_member(grads), layer.parts(), strict=True)
        grad, (weight, _) = next(parts)
        total = grad @ weight
        for grad, (weight, _) in parts:
            total.addmm_(grad, weight)
        keeps = grad_shrunk[len(layer.members) :]
        for number, lora_a in enumerate(layer.lora_a(self.bank)):
            for run in self.groups.runs:
                left, factor = _rows_first(grad_shrunk[number], run), bank_rows(lora_a, run.slots)
                if keeps:
                    grouped(total, run).addcmul_(torch.bmm(left, factor), grouped(keeps[number], run))
                else:
                    grouped(total, run).baddbmm_(left, factor)
        return total

    def factor_gradient(self, x: Tensor | NormedRows, layer: AdaptedLayer, grad_shrunk: Shrunk) -> None:
        if self.gradients is None or not self.trains_a or not layer.present:
            return
        x = x if isinstance(x, Tensor) else _normed(x)
        keeps = grad_shrunk[len(layer.members) :]
        for number, sink in enumerate(layer.lora_a(self.gradients)):
            dropped = x * keeps[number] if keeps else x
            for run in self.groups.runs:
                narrow = lora_torch.rank_major(grad_shrunk[number], run)
                add_to_bank(sink, run.slots, torch.bmm(narrow, grouped(dropped, run)))

    def activation_gradient(
        self, grad_y: Tensor, wide: Outputs, kind: Activation, reader: AdaptedLayer, grad_shrunk: Shrunk
    ) -> Outputs:
        if kind != "swiglu":
            self.factor_gradient(_activation(wide, kind), reader, grad_shrunk)
            return [torch.ops.aten.gelu_backward(grad_y, wide[0], approximate="none" if kind == "gelu" else "tanh")]
        gate, up = wide
        active = F.silu(gate)
        y = active * up
        self.factor_gradient(y, reader, grad_shrunk)
        of_active, of_up = torch.mul(grad_y, up, out=y), active.mul_(grad_y)
        return [torch.ops.aten.silu_backward(of_active, gate), of_up]

    def norm_gradient(
        self, grad_x: Tensor, normed: NormedRows, residual: StreamRows, out: StreamRows | None = None
    ) -> Tensor:
        norm, rows = normed.norm, normed.rows
        if norm.kind == "layer":
            grad: Tensor = torch.ops.aten.native_layer_norm_backward(
                grad_x, rows, rows.shape[1:], normed.mean[:, None], normed.inverse[:, None], norm.weight, norm.bias,
                [True, False, False],
            )[0]  # fmt: skip
        else:
            inverse = normed.inverse[:, None]
            wide, scaled = (grad_x * norm.weight).to(inverse.dtype), rows * inverse
            scaled.mul_((wide * scaled).mean(1, keepdim=True))
            grad = wide.sub_(scaled).mul_(inverse).to(rows.dtype)
        grad += residual.read()
        return grad if out is None else out.write(grad)

    def finish(self) -> None:
        """Gradients were added as they were found."""

    def _shrink(self, x: Tensor, layer: AdaptedLayer) -> Shrunk:
        keeps = [keep_mask(drop, self.groups.sizes, x.shape[1]) for drop in self.dropouts(layer) if drop is not None]
        masks: Sequence[Tensor | None] = keeps or [None] * len(layer.present)
        factors = zip(layer.lora_a(self.bank), masks, strict=True)
        return [*[lora_torch.shrink(x, lora_a, self.groups, keep) for lora_a, keep in factors], *keeps]


def _activation(wide: Outputs, kind: Activation) -> Tensor:
    if kind == "swiglu":
        gate, up = wide
        return F.silu(gate).mul_(up)
    return F.gelu(wide[0], approximate="none" if kind == "gelu" else "tanh")


def _normed(normed: NormedRows) -> Tensor:
    norm, rows = normed.norm, normed.rows
    if norm.kind == "layer":
        return F.layer_norm(rows, rows.shape[1:], norm.weight, norm.bias, norm.eps)
    return _scaled(rows, normed.inverse, norm)


def _scaled(rows: Tensor, inverse: Tensor, norm: Norm) -> Tensor:
    """RMSNorm of rows from their inverse deviations [rows], rounded once."""
    return (rows * inverse[:, None]).mul_(norm.weight).to(rows.dtype)


def _rows_first(shrunk: Tensor, run: Run) -> Tensor:
    return lora_torch.rank_major(shrunk, run).transpose(1, 2)
