"""Gather a block's rows from the residual stream and normalize them; optionally shrink them for LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ._kernels.checks import check_index, check_like, check_shape, check_stream, stream_rows
from ._kernels.configs import NARROW_RANK
from ._kernels.gather_norm import MAX_SHRINKS, gather_norm_backward, gather_norm_forward, norm_tile
from .dispatch import use_triton
from .dropout import Dropout
from .groups import RowGroups
from .lora_linear import check_adapter_input, shrink

NormKind = Literal["layer", "rms"]


def gather_norm(
    hidden: Tensor,
    index: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    kind: NormKind,
    eps: float,
    lora_a: Sequence[Tensor] = (),
    groups: RowGroups | None = None,
    dropout: Sequence[Dropout] = (),
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """x = norm(hidden[index]), and S = drop(x) A_k^T for each adapter that reads x, from one pass.

    Args:
        hidden: [rows of the stream, features] or [samples, ..., features], whose leading dimensions, flattened, are
            the rows of the stream; contiguous. It may be updated in place afterwards.
        index: int64 [rows], unique rows of the stream. On a GPU its values are not checked: a row outside
            the stream becomes NaN.
        weight: [features], frozen. bias: [features] or None, frozen.
        kind: "layer" for LayerNorm, "rms" for RMSNorm, which takes no bias.
        lora_a: the A banks [slots, rank, features] of the layers that read x, at most three of one shape
            (query, key and value).
        groups: the slot of each of the rows; needed with lora_a.
        dropout: one for each bank, all with one p; empty for none.

    Returns:
        x [rows, features], differentiable in hidden; and for each bank `shrunk` as `lora_linear` takes it.

    Raises:
        ValueError: a shape, dtype, device, group table or row number does not fit.
    """
    _check(hidden, index, weight, bias, kind, lora_a, groups, dropout)
    fused = use_triton(hidden) and all(bank.shape[1] <= NARROW_RANK for bank in lora_a)
    if fused:
        x, *shrunk = _GatherNorm.apply(hidden, index, weight, bias, kind, eps, tuple(lora_a), groups, tuple(dropout))
        return x, tuple(shrunk)
    if use_triton(hidden):
        (x,) = _GatherNorm.apply(hidden, index, weight, bias, kind, eps, (), None, ())
    else:
        x = _normalize(stream_rows(hidden).index_select(0, index), weight, bias, kind, eps)
    if groups is None:
        return x, ()
    drops: Sequence[Dropout | None] = dropout or [None] * len(lora_a)
    with torch.no_grad():
        return x, tuple(shrink(x, bank, groups, drop) for bank, drop in zip(lora_a, drops, strict=True))


def gather_norm_reference(
    hidden: Tensor, index: Tensor, weight: Tensor, bias: Tensor | None, *, kind: NormKind, eps: float
) -> Tensor:
    """norm(hidden[index]) in plain torch, differentiable in every tensor."""
    rows = stream_rows(hidden)[index]
    if kind == "layer":
        rows = rows - rows.mean(1, keepdim=True)
    normalized = rows * torch.rsqrt(rows.square().mean(1, keepdim=True) + eps) * weight
    return normalized if bias is None else normalized + bias


def _normalize(rows: Tensor, weight: Tensor, bias: Tensor | None, kind: NormKind, eps: float) -> Tensor:
    if kind == "layer":
        return F.layer_norm(rows, rows.shape[1:], weight, bias, eps)
    return F.rms_norm(rows, rows.shape[1:], weight, eps)


class _GatherNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        index: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        kind: NormKind,
        eps: float,
        lora_a: tuple[Tensor, ...],
        groups: RowGroups | None,
        dropout: tuple[Dropout, ...],
    ) -> tuple[Tensor, ...]:
        chunks = None if groups is None else groups.chunks(norm_tile(hidden, lora_a).rows).rows
        keys = [drop.keys for drop in dropout]
        threshold = dropout[0].threshold if dropout else 0
        saves = ctx.needs_input_grad[0]
        x, rows, mean, inverse, together = gather_norm_forward(
            stream_rows(hidden), index, weight, bias, eps, kind == "rms", saves, list(lora_a), chunks, keys, threshold
        )
        shrunk = [part.contiguous() for part in together.chunk(len(lora_a), dim=1)] if lora_a else []
        ctx.save_for_backward(index, weight, rows, mean, inverse)
        ctx.shape, ctx.kind = hidden.shape, kind
        ctx.mark_non_differentiable(*shrunk)
        # Else every backward would be given zeros as the gradients of the shrunk rows.
        ctx.set_materialize_grads(False)
        return x, *shrunk

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_x: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_x is None:
            return (None,) * 9
        index, weight, rows, mean, inverse = ctx.saved_tensors
        grad_hidden = grad_x.new_zeros(ctx.shape)
        gather_norm_backward(
            grad_x.contiguous(),
            weight,
            rows,
            mean,
            inverse,
            ctx.kind == "rms",
            None,
            None,
            stream_rows(grad_hidden),
            index,
        )
        return grad_hidden, *([None] * 8)


def _check(
    hidden: Tensor,
    index: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kind: NormKind,
    lora_a: Sequence[Tensor],
    groups: RowGroups | None,
    dropout: Sequence[Dropout],
) -> None:
    check_stream("hidden", hidden)
    check_index("index", index, "hidden", stream_rows(hidden.detach()))
    if kind not in ("layer", "rms"):
        raise ValueError(f"kind: found {kind!r}, expected 'layer' or 'rms'")
    if kind == "rms" and bias is not None:
        raise ValueError("bias: found a tensor, expected None for RMSNorm")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            check_shape(name, tensor, (hidden.shape[-1],))
            check_like(name, tensor, "hidden", hidden)
    if len(lora_a) > MAX_SHRINKS:
        raise ValueError(f"lora_a: found {len(lora_a)} banks, expected at most {MAX_SHRINKS}")
    if bool(lora_a) != (groups is not None):
        found = "None" if groups is None else "groups"
        raise ValueError(f"groups: found {found}, expected them exactly when lora_a is given")
    if dropout and (len(dropout) != len(lora_a) or len({drop.p for drop in dropout}) > 1):
        raise ValueError(
            f"dropout: found p {[drop.p for drop in dropout]}, expected one p for each of {len(lora_a)} banks"
        )
    if groups is None:
        return
    for number, bank in enumerate(lora_a):
        check_shape("lora_a", bank, lora_a[0].shape)
        drop = dropout[number] if dropout else None
        check_adapter_input(index.shape[0], bank, groups, drop, hidden)
