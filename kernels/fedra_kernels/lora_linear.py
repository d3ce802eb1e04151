"""Grouped LoRA linear: one frozen product for all rows, a low-rank product per row group."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ._kernels import lora_torch
from ._kernels.checks import check_bank, check_device, check_float, check_like, check_shape, check_sink
from ._kernels.configs import MAX_RANK, NARROW_RANK, gradient_chunk
from ._kernels.lora_gemm import gemm_tile, lora_gemm
from ._kernels.lora_grad_outer import lora_grad_outer
from ._kernels.lora_grad_output import lora_grad_output
from ._kernels.lora_grad_reduce import lora_grad_reduce
from ._kernels.lora_shrink import lora_shrink, shrink_tile
from ._kernels.lora_single_pass import lora_single_pass, single_pass_tile
from ._kernels.tile_loads import is_column_major
from .dispatch import use_triton
from .dropout import Dropout, dropout_mask, keep_mask
from .groups import RowGroups

SINGLE_PASS_OUTPUTS = 4096
"""Wider layers hide the extra read of x better than the repeated shrink of each column tile."""


def lora_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    groups: RowGroups,
    scale: float,
    grad_a: Tensor | None,
    grad_b: Tensor | None,
    dropout: Dropout | None = None,
    *,
    input_first: bool = False,
) -> Tensor:
    """y = x W^T + b + scale (drop(x) A_k^T) B_k^T for the rows of group k.

    Args:
        x: [rows, in] or [samples, ..., in]; the leading dimensions, flattened, are the rows of `groups`.
        weight: [out, in], frozen. Kept for backward itself, not a view of it: who empties and refills a parameter
            through `.data` in between (as ZeRO-3 does) frees its memory. None leaves the frozen product out, for layers
            that multiply by themselves; then there is no bias, and y is the low-rank product alone.
        bias: [out] or None, frozen.
        lora_a: [slots, rank, in], a view into the adapter bank; any stride between slots. Smaller ranks are
            padded with zeros, and the padding then has an exactly zero gradient.
        lora_b: [slots, out, rank].
        groups: the rows of each slot.
        scale: of the low-rank product, alpha / rank.
        grad_a: gradient sink shaped as lora_a: backward adds each touched slot's dA into it. Its dtype may
            be wider than the bank's. None where A is frozen: dA is not computed.
        grad_b: gradient sink shaped as lora_b, or None where B is frozen.
        dropout: LoRA dropout on the adapter's input; None for none.
        input_first: the weight is stored as [in, out].

    Returns:
        y, shaped as x with `out` for `in`. autograd differentiates with respect to x alone. Where x needs no
        gradient, `requires_grad` of a bank makes backward run for the sinks.

    Raises:
        ValueError: a shape, dtype, device or group table does not fit.
    """
    oriented = None if weight is None else _oriented(weight, input_first)
    _check(x, oriented, bias, lora_a, lora_b, groups, grad_a, grad_b)
    check_adapter_input(x.numel() // x.shape[-1], lora_a, groups, dropout, x)
    rows = x.reshape(-1, x.shape[-1])
    y: Tensor = _LoraLinear.apply(
        rows, weight, bias, lora_a, lora_b, groups, scale, grad_a, grad_b, dropout, input_first
    )
    return y.view(*x.shape[:-1], lora_b.shape[1])


def lora_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    groups: RowGroups,
    scale: float,
    dropout: Dropout | None = None,
) -> Tensor:
    """The op group by group in plain torch, differentiable in every tensor."""
    rows = x.reshape(-1, x.shape[-1])
    outputs = []
    for group, part in enumerate(rows.split(groups.sizes)):
        slot = groups.host_slots[group]
        dropped = part
        if dropout is not None:
            key = int(dropout.keys[group])
            dropped = part * dropout_mask(
                key, part.shape[0], part.shape[1], dropout.p, dtype=part.dtype, device=part.device
            )
        low_rank = dropped @ lora_a[slot].T @ lora_b[slot].T
        outputs.append(F.linear(part, weight, bias) + scale * low_rank)
    y = torch.cat(outputs) if outputs else F.linear(rows, weight, bias)
    return y.view(*x.shape[:-1], weight.shape[0])


def dropout_arguments(dropout: Dropout | None) -> tuple[Tensor | None, int]:
    """keys and threshold for the kernels."""
    return (None, 0) if dropout is None else (dropout.keys, dropout.threshold)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        groups: RowGroups,
        scale: float,
        grad_a: Tensor | None,
        grad_b: Tensor | None,
        dropout: Dropout | None,
        input_first: bool,
    ) -> Tensor:
        ctx.groups, ctx.grad_a, ctx.grad_b, ctx.dropout = groups, grad_a, grad_b, dropout
        # What kept entries are multiplied by is folded into the scale.
        scale = scale if dropout is None else scale / (1.0 - dropout.p)
        ctx.input_first, ctx.scale = input_first, scale
        stored, keep = weight, None
        weight = x.new_empty(lora_b.shape[1], 0) if stored is None else _oriented(stored, input_first)
        if use_triton(x):
            x = x.contiguous()
            y, shrunk = _triton_forward(x, weight, bias, lora_a, lora_b, groups, scale, dropout)
        else:
            keep = _keep(dropout, groups, x)
            shrunk = lora_torch.shrink(x, lora_a, groups, keep)
            y = F.linear(x[:, : weight.shape[1]], weight, bias)
            lora_torch.expand(y, shrunk, lora_b, groups, scale)
        # A frozen factor frees what only its gradient reads.
        kept_x, kept_shrunk = (None if grad_a is None else x), (None if grad_b is None else shrunk)
        ctx.save_for_backward(kept_x, stored, lora_a, lora_b, kept_shrunk, keep)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, stored, lora_a, lora_b, shrunk, keep = ctx.saved_tensors
        grad_y = grad_y.contiguous()
        weight = grad_y.new_empty(0, lora_a.shape[2]) if stored is None else _oriented(stored, ctx.input_first)
        needs_grad_x = ctx.needs_input_grad[0]
        if use_triton(grad_y):
            grad_x = _triton_backward(
                grad_y, x, weight, lora_a, lora_b, shrunk,
                ctx.groups, ctx.scale, ctx.dropout, ctx.grad_a, ctx.grad_b, needs_grad_x,
            )  # fmt: skip
        else:
            grad_x = grad_y[:, : len(weight)] @ weight if needs_grad_x else None
            lora_torch.backward(
                grad_y, grad_x, x, lora_a, lora_b, shrunk, keep, ctx.groups, ctx.scale, ctx.grad_a, ctx.grad_b
            )
        return grad_x, *([None] * 10)


def _oriented(weight: Tensor, input_first: bool) -> Tensor:
    """The stored weight as [out, in]."""
    return weight.T if input_first else weight


def _triton_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    groups: RowGroups,
    scale: float,
    dropout: Dropout | None,
) -> tuple[Tensor, Tensor]:
    rank = lora_a.shape[1]
    narrow = rank <= NARROW_RANK and weight.shape[0] <= SINGLE_PASS_OUTPUTS
    if dropout is None and narrow and weight.shape[1] > 0:
        spans = groups.spans(single_pass_tile(x, rank).rows)
        return lora_single_pass(x, weight, bias, lora_a, lora_b, spans, groups.filled, scale)
    pieces = groups.chunks(shrink_tile(x, rank).rows).rows
    shrunk = lora_shrink(x, lora_a, pieces, 1.0, *dropout_arguments(dropout), False)
    spans = groups.spans(gemm_tile(x, rank).rows)
    inputs = x if weight.shape[1] > 0 else x[:, :0]
    y = lora_gemm([inputs], weight, bias, shrunk, [lora_b], [len(weight)], spans, groups.filled, scale)
    return y, shrunk


def _triton_backward(
    grad_y: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    shrunk: Tensor | None,
    groups: RowGroups,
    scale: float,
    dropout: Dropout | None,
    grad_a: Tensor | None,
    grad_b: Tensor | None,
    needs_grad_x: bool,
) -> Tensor | None:
    rank = lora_a.shape[1]
    grad_shrunk = grad_x = None
    keys, threshold = dropout_arguments(dropout)
    chunks = groups.chunks(gradient_chunk(grad_y))
    entries_a, entries_b = (0 if sink is None else sink[0].numel() for sink in (grad_a, grad_b))
    partials = grad_y.new_empty(chunks.rows.shape[0], entries_a + entries_b, dtype=torch.float32)
    if shrunk is not None and grad_b is not None:
        if rank <= NARROW_RANK and (grad_a is not None or needs_grad_x):
            grad_shrunk, _ = lora_grad_output(
                [grad_y], [lora_b], shrunk, chunks.rows, partials, [entries_a], scale, None, None
            )
        else:
            lora_grad_outer(grad_y, shrunk, chunks.rows, partials, entries_a, 0, rank, False, scale)
    if grad_shrunk is None and (grad_a is not None or needs_grad_x):
        pieces = groups.chunks(shrink_tile(grad_y, rank).rows).rows
        grad_shrunk = lora_shrink(grad_y, lora_b, pieces, scale, None, 0, True)
    if grad_shrunk is not None and x is not None and grad_a is not None:
        lora_grad_outer(x, grad_shrunk, chunks.rows, partials, 0, 0, rank, True, 1.0, keys, threshold)
    if entries_a + entries_b:
        lora_grad_reduce(partials, chunks.groups, grad_a, grad_b)
    if grad_shrunk is not None and needs_grad_x:
        spans = groups.spans(gemm_tile(grad_y, rank).rows)
        outputs = grad_y if weight.shape[0] > 0 else grad_y[:, :0]
        grad_x = lora_gemm(
            [outputs], weight, None, grad_shrunk, [lora_a], [lora_a.shape[2]],
            spans, groups.filled, None, keys, threshold, True,
        )  # fmt: skip
    return grad_x


def _keep(dropout: Dropout | None, groups: RowGroups, x: Tensor) -> Tensor | None:
    return None if dropout is None else keep_mask(dropout, groups.sizes, x.shape[1])


def check_adapter_input(rows: int, lora_a: Tensor, groups: RowGroups, dropout: Dropout | None, x: Tensor) -> None:
    """Raise ValueError unless groups, bank and dropout fit x with `rows` rows."""
    if rows != groups.rows:
        raise ValueError(f"groups: found {groups.rows} rows in sizes, expected {rows} as x has")
    check_shape("lora_a", lora_a, (None, None, x.shape[-1]))
    check_like("lora_a", lora_a, "x", x)
    check_bank("lora_a", lora_a)
    slots, rank = lora_a.shape[:2]
    if not 1 <= rank <= MAX_RANK:
        raise ValueError(f"lora_a: found rank {rank}, expected 1 to {MAX_RANK}")
    if groups.smallest_bank > slots:
        raise ValueError(f"groups: found slot {groups.smallest_bank - 1}, expected slots below {slots}")
    check_device("groups", groups, "x", x)
    if dropout is not None:
        check_shape("dropout.keys", dropout.keys, (len(groups),))
        check_device("dropout.keys", dropout.keys, "x", x)


def _check(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    groups: RowGroups,
    grad_a: Tensor | None,
    grad_b: Tensor | None,
) -> None:
    check_float("x", x)
    outputs = None
    if weight is not None:
        check_shape("weight", weight, (None, None))
        outputs, inputs = weight.shape
        if x.dim() < 2 or x.shape[-1] != inputs:
            raise ValueError(f"x: found shape {list(x.shape)}, expected [rows, {inputs}] as weight has")
        check_like("weight", weight, "x", x)
        if use_triton(x):
            is_column_major(weight)  # Raises where the kernels could not read it.
    elif bias is not None:
        raise ValueError("bias: found one without a weight, expected None")
    check_shape("lora_a", lora_a, (None, None, x.shape[-1]))
    check_shape("lora_b", lora_b, (lora_a.shape[0], outputs, lora_a.shape[1]))
    if bias is not None:
        check_shape("bias", bias, (outputs,))
        check_like("bias", bias, "x", x)
    check_like("lora_b", lora_b, "x", x)
    check_bank("lora_b", lora_b)
    for name, sink, bank in (("grad_a", grad_a, lora_a), ("grad_b", grad_b, lora_b)):
        if sink is not None:
            check_sink(name, sink, bank, "x", x)
