"""GELU and SwiGLU, optionally with the LoRA shrink of the layer that reads the result."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ._kernels.activation import activation_backward, activation_forward, activation_tile
from ._kernels.checks import check_float, check_like, check_shape
from ._kernels.configs import NARROW_RANK
from .dispatch import use_triton
from .dropout import Dropout
from .groups import RowGroups
from .lora_linear import check_adapter_input, dropout_arguments, shrink


def gelu(
    x: Tensor,
    *,
    approximate: Literal["none", "tanh"] = "none",
    lora_a: Tensor | None = None,
    groups: RowGroups | None = None,
    dropout: Dropout | None = None,
) -> tuple[Tensor, Tensor | None]:
    """y = GELU(x) (Hendrycks and Gimpel, 2016), and S = drop(y) A_k^T for the adapter that reads y.

    Args:
        x: [rows, features] or [samples, ..., features].
        approximate: "none" for the error function, "tanh" for its approximation.
        lora_a: the A bank [slots, rank, features] of the layer that reads y; None for no shrink.
        groups: the slot of each row; needed with lora_a.
        dropout: LoRA dropout of that layer; None for none.

    Returns:
        y, shaped as x and differentiable in it; and `shrunk` as `lora_linear` takes it, or None.

    Raises:
        ValueError: a shape, dtype, device or group table does not fit.
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate: found {approximate!r}, expected 'none' or 'tanh'")
    kind = "gelu" if approximate == "none" else "gelu_tanh"
    return _activation(kind, x, None, lora_a, groups, dropout)


def swiglu(
    gate: Tensor,
    up: Tensor,
    *,
    lora_a: Tensor | None = None,
    groups: RowGroups | None = None,
    dropout: Dropout | None = None,
) -> tuple[Tensor, Tensor | None]:
    """y = SiLU(gate) * up (Shazeer, 2020), and S = drop(y) A_k^T; arguments and results as for `gelu`.

    gate and up have one shape and dtype; y is differentiable in both.
    """
    check_float("gate", gate)
    check_shape("up", up, gate.shape)
    check_like("up", up, "gate", gate)
    return _activation("swiglu", gate, up, lora_a, groups, dropout)


def activation_reference(kind: str, x: Tensor, up: Tensor | None) -> Tensor:
    """The activation `gelu`, `gelu_tanh` or `swiglu` in plain torch, differentiable in x and up."""
    if up is not None:
        return x * torch.sigmoid(x) * up
    if kind == "gelu":
        return 0.5 * x * (1.0 + torch.erf(x / 2**0.5))
    return 0.5 * x * (1.0 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def _activation(
    kind: str,
    x: Tensor,
    up: Tensor | None,
    lora_a: Tensor | None,
    groups: RowGroups | None,
    dropout: Dropout | None,
) -> tuple[Tensor, Tensor | None]:
    name = "x" if up is None else "gate"
    check_float(name, x)
    if x.dim() < 2:
        raise ValueError(f"{name}: found shape {list(x.shape)}, expected [rows, features]")
    if (lora_a is None) != (groups is None):
        found = "None" if groups is None else "groups"
        raise ValueError(f"groups: found {found}, expected them exactly when lora_a is given")
    rows = x.reshape(-1, x.shape[-1])
    other = None if up is None else up.reshape(-1, x.shape[-1])
    if lora_a is not None and groups is not None:
        check_adapter_input(rows.shape[0], lora_a, groups, dropout, x)
    shrunk = None
    if not use_triton(x):
        y = _torch_activation(kind, rows, other)
    elif lora_a is None or lora_a.shape[1] <= NARROW_RANK:
        y, *fused = _Activation.apply(kind, rows, other, lora_a, groups, dropout)
        shrunk = fused[0] if fused else None
    else:
        (y,) = _Activation.apply(kind, rows, other, None, None, None)
    if shrunk is None and lora_a is not None and groups is not None:
        with torch.no_grad():
            shrunk = shrink(y, lora_a, groups, dropout)
    return y.view(x.shape), shrunk


def _torch_activation(kind: str, x: Tensor, up: Tensor | None) -> Tensor:
    if up is not None:
        return F.silu(x) * up
    return F.gelu(x, approximate="none" if kind == "gelu" else "tanh")


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        kind: str,
        x: Tensor,
        up: Tensor | None,
        lora_a: Tensor | None,
        groups: RowGroups | None,
        dropout: Dropout | None,
    ) -> tuple[Tensor, ...]:
        x = x.contiguous()
        up = None if up is None else up.contiguous()
        chunks = None if groups is None else groups.chunks(activation_tile(x, lora_a).rows).rows
        y, *shrunk = activation_forward(kind, x, up, lora_a, chunks, *dropout_arguments(dropout))
        ctx.kind = kind
        ctx.save_for_backward(x, up)
        ctx.mark_non_differentiable(*shrunk)
        # Else every backward would be given zeros as the gradient of the shrunk rows.
        ctx.set_materialize_grads(False)
        return y, *shrunk

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_y is None:
            return (None,) * 6
        x, up = ctx.saved_tensors
        grad_x, *grad_up = activation_backward(ctx.kind, grad_y.contiguous(), x, up)
        return None, grad_x, grad_up[0] if grad_up else None, None, None, None
