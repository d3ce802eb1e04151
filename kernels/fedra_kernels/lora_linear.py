"""Grouped LoRA linear: one frozen product for all rows, a low-rank product per row group."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

from .checks import FLOAT_DTYPES, check_bank, check_device, check_dtype, check_like, check_shape
from .counter_hash import Dropout, dropout_mask, keep_mask
from .groups import RowGroups, Run, add_product, bank_rows


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    groups: RowGroups,
    grad_a: Tensor,
    grad_b: Tensor,
    dropout: Dropout | None = None,
) -> Tensor:
    """y = x W^T + b + scale_k (drop(x) A_k^T) B_k^T for the rows of group k.

    Args:
        x: [rows, in] or [samples, ..., in]; the leading dimensions, flattened, are the rows of `groups`.
        weight: [out, in], frozen.
        bias: [out] or None, frozen.
        lora_a: [slots, rank, in], a view into the adapter bank; any stride between slots. Smaller ranks are
            padded with zeros, and the padding then has an exactly zero gradient.
        lora_b: [slots, out, rank].
        groups: the rows of each slot and its scale, alpha / rank.
        grad_a: gradient sink shaped as lora_a: backward adds each touched slot's dA into it. Its dtype may
            be wider than the bank's.
        grad_b: gradient sink shaped as lora_b.
        dropout: LoRA dropout on the adapter's input; None for none.

    Returns:
        y, shaped as x with `out` for `in`. autograd differentiates with respect to x alone. Where x needs no
        gradient, `lora_a.requires_grad` makes backward run for the sinks.

    Raises:
        ValueError: a shape, dtype, device or group table does not fit.
    """
    _check(x, weight, bias, lora_a, lora_b, groups, grad_a, grad_b, dropout)
    rows = x.reshape(-1, x.shape[-1])
    y: Tensor = _LoraLinear.apply(rows, weight, bias, lora_a, lora_b, groups, grad_a, grad_b, dropout)
    return y.view(*x.shape[:-1], weight.shape[0])


def lora_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    groups: RowGroups,
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
        outputs.append(F.linear(part, weight, bias) + groups.scales[group].to(part.dtype) * low_rank)
    y = torch.cat(outputs) if outputs else F.linear(rows, weight, bias)
    return y.view(*x.shape[:-1], weight.shape[0])


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        groups: RowGroups,
        grad_a: Tensor,
        grad_b: Tensor,
        dropout: Dropout | None,
    ) -> Tensor:
        y = F.linear(x, weight, bias)
        keep = None if dropout is None else keep_mask(dropout, groups.sizes, x.shape[1])
        adapter_input = x if keep is None else x * keep
        gain = 1.0 if dropout is None else 1.0 / (1.0 - dropout.p)
        shrunk = x.new_empty(x.shape[0], lora_a.shape[1])
        for run in groups.runs:
            run_shrunk = _grouped(shrunk, run)
            torch.bmm(
                _grouped(adapter_input, run), bank_rows(lora_a, run.slots).transpose(1, 2), out=run_shrunk
            )
            _add_scaled_product(
                _grouped(y, run), run_shrunk, bank_rows(lora_b, run.slots).transpose(1, 2), run.scale, gain
            )
        ctx.save_for_backward(x, weight, lora_a, lora_b, shrunk, keep)
        ctx.groups, ctx.grad_a, ctx.grad_b, ctx.gain = groups, grad_a, grad_b, gain
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_a, lora_b, shrunk, keep = ctx.saved_tensors
        grad_y = grad_y.contiguous()
        adapter_input = x if keep is None else x * keep
        grad_x = grad_y @ weight if ctx.needs_input_grad[0] else None
        for run in ctx.groups.runs:
            run_grad_y = _grouped(grad_y, run)
            factor = run.scale * ctx.gain
            grad_shrunk = torch.bmm(run_grad_y, bank_rows(lora_b, run.slots)).mul_(factor)
            scaled_shrunk = _grouped(shrunk, run) * factor
            add_product(ctx.grad_b, run.slots, run_grad_y.transpose(1, 2), scaled_shrunk)
            add_product(
                ctx.grad_a, run.slots, grad_shrunk.transpose(1, 2), _grouped(adapter_input, run)
            )
            if grad_x is None:
                continue
            run_grad_x, run_a = _grouped(grad_x, run), bank_rows(lora_a, run.slots)
            if keep is None:
                run_grad_x.baddbmm_(grad_shrunk, run_a)
            else:
                run_grad_x.addcmul_(torch.bmm(grad_shrunk, run_a), _grouped(keep, run))
        return grad_x, *([None] * 8)


def _grouped(rows: Tensor, run: Run) -> Tensor:
    """The run's rows of a [rows, features] matrix as [groups, size, features], a view."""
    return rows[run.rows].view(run.count, run.size, rows.shape[1])


def _add_scaled_product(out: Tensor, left: Tensor, right: Tensor, scale: float | Tensor, gain: float) -> None:
    """out += scale * gain * left @ right, in place."""
    if isinstance(scale, float):
        out.baddbmm_(left, right, alpha=scale * gain)
    else:
        out.baddbmm_((left * (scale * gain)).to(left.dtype), right)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    groups: RowGroups,
    grad_a: Tensor,
    grad_b: Tensor,
    dropout: Dropout | None,
) -> None:
    check_dtype("x", x, FLOAT_DTYPES)
    check_shape("weight", weight, (None, None))
    outputs, inputs = weight.shape
    if x.dim() < 2 or x.shape[-1] != inputs:
        raise ValueError(f"x: found shape {list(x.shape)}, expected [rows, {inputs}] as weight has")
    if x.numel() != groups.rows * inputs:
        raise ValueError(
            f"groups: found {groups.rows} rows in sizes, expected {x.numel() // inputs} as x has"
        )
    check_shape("lora_a", lora_a, (None, None, inputs))
    slots, rank = lora_a.shape[:2]
    check_shape("lora_b", lora_b, (slots, outputs, rank))
    check_shape("grad_a", grad_a, lora_a.shape)
    check_shape("grad_b", grad_b, lora_b.shape)
    if groups.smallest_bank > slots:
        raise ValueError(f"groups: found slot {groups.smallest_bank - 1}, expected slots below {slots}")
    if bias is not None:
        check_shape("bias", bias, (outputs,))
        check_like("bias", bias, "x", x)
    for name, tensor in (("weight", weight), ("lora_a", lora_a), ("lora_b", lora_b)):
        check_like(name, tensor, "x", x)
    check_device("groups", groups.slots, "x", x)
    for name, sink in (("grad_a", grad_a), ("grad_b", grad_b)):
        check_device(name, sink, "x", x)
        check_dtype(name, sink, (x.dtype, torch.float32, torch.float64))
    for name, bank in (("lora_a", lora_a), ("lora_b", lora_b), ("grad_a", grad_a), ("grad_b", grad_b)):
        check_bank(name, bank)
    if dropout is not None:
        check_shape("dropout.keys", dropout.keys, (len(groups),))
        check_device("dropout.keys", dropout.keys, "x", x)
