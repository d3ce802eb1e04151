"""SGD over bank slots, each with its own learning rate and clip factor, in place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._kernels.optimizers import check_step, step_rows
from ._kernels.row_tables import bank_piece, piece_grid
from .dispatch import in_place, launch, register, use_triton

SCHEMA = (
    "sgd_(Tensor(a!) param, Tensor(b!) grad, Tensor(c!)? momentum_buffer, Tensor(d!)? shadow, Tensor slots, "
    "Tensor lr, Tensor clip, Tensor step, float momentum, float weight_decay, bool zero_grad) -> ()"
)
BLOCK = 1024


def sgd(
    param: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None,
    slots: Tensor,
    lr: Tensor,
    clip: Tensor,
    step: Tensor,
    *,
    momentum: float,
    weight_decay: float,
    shadow: Tensor | None = None,
    zero_grad: bool = False,
) -> None:
    """One step of torch.optim.SGD (dampening 0, no Nesterov) on the bank rows `slots`.

    g = clip_i * grad + weight_decay * param; buffer = momentum * buffer + g; param -= lr_i * buffer.

    Args:
        param, grad, momentum_buffer: [slots, P], or the same columns of wider banks; param and buffer are
            updated in place. momentum_buffer is None exactly when momentum is 0. grad and buffer may be fp32 where
            param is a 16-bit bank. What the buffer of a slot holds before its first step does not count: it begins
            with zeros.
        slots: int64 [n], distinct bank rows. On a GPU its values are not checked: a slot outside the bank
            is left out.
        lr, clip: [n], fp32 (fp64 for fp64 banks).
        step: int64 [n], the number of the step, from 1, of each slot's client.
        shadow: 16-bit copy [slots, P] of param, kept up to date, or None.
        zero_grad: also set the rows `slots` of grad to zero, once used, in the same pass.

    Raises:
        ValueError: a shape, dtype, device or slot does not fit.
    """
    check_step(param, {"grad": grad, "momentum_buffer": momentum_buffer}, shadow, slots, lr, clip, step)
    if (momentum_buffer is None) != (momentum == 0.0):
        found = "None" if momentum_buffer is None else "a tensor"
        raise ValueError(f"momentum_buffer: found {found}, expected None exactly when momentum is 0")
    if use_triton(param):
        sgd_rows(param, grad, momentum_buffer, shadow, slots, lr, clip, step, momentum, weight_decay, zero_grad)
        return

    def fused(params: list[Tensor], grads: list[Tensor], *buffers: list[Tensor], lr: float, steps: object) -> None:
        torch._fused_sgd_(
            params, grads, buffers[0] if buffers else [], lr=lr, momentum=momentum, weight_decay=weight_decay,
            dampening=0.0, nesterov=False, maximize=False, is_first_step=False,
        )  # fmt: skip

    states = [] if momentum_buffer is None else [momentum_buffer]
    step_rows(param, grad, states, shadow, slots, lr, clip, step, zero_grad, fused)


def sgd_reference(
    param: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor,
    lr: Tensor,
    clip: Tensor,
    step: Tensor,
    *,
    momentum: float,
    weight_decay: float,
) -> tuple[Tensor, Tensor]:
    """New (param, momentum buffer) of rows [n, P], with lr, clip and step [n], in plain torch."""
    old = torch.where(step[:, None] == 1, 0.0, momentum_buffer)
    buffer = momentum * old + clip[:, None] * grad + weight_decay * param
    return param - lr[:, None] * buffer, buffer


@triton.jit(do_not_specialize=["slots_ptr", "lr_ptr", "clip_ptr", "step_ptr", "slot_count"])
def sgd_kernel(
    param_ptr,
    grad_ptr,
    buffer_ptr,
    shadow_ptr,
    slots_ptr,
    lr_ptr,
    clip_ptr,
    step_ptr,
    slot_count,
    stride_param,
    stride_grad,
    stride_buffer,
    stride_shadow,
    entries,
    momentum,
    weight_decay,
    BLOCK: tl.constexpr,
    MOMENTUM: tl.constexpr,
    SHADOW: tl.constexpr,
    ZERO_GRAD: tl.constexpr,
):
    """One program steps one piece of one slot."""
    number, _, offset = bank_piece(entries, BLOCK)
    slot = tl.load(slots_ptr + number)
    mask = (offset < entries) & (slot >= 0) & (slot < slot_count)
    param_ptrs = param_ptr + slot * stride_param + offset
    param = tl.load(param_ptrs, mask=mask, other=0.0).to(tl.float32)
    grad_ptrs = grad_ptr + slot * stride_grad + offset
    grad = tl.load(grad_ptrs, mask=mask, other=0.0).to(tl.float32)
    step = grad * tl.load(clip_ptr + number) + weight_decay * param
    if MOMENTUM:
        # The buffer of a first step is zeros that nobody had to write.
        old = mask & (tl.load(step_ptr + number) > 1)
        buffer_ptrs = buffer_ptr + slot * stride_buffer + offset
        step += momentum * tl.load(buffer_ptrs, mask=old, other=0.0).to(tl.float32)
        tl.store(buffer_ptrs, step.to(buffer_ptr.dtype.element_ty), mask=mask)
    param -= tl.load(lr_ptr + number) * step
    tl.store(param_ptrs, param.to(param_ptr.dtype.element_ty), mask=mask)
    if SHADOW:
        shadow = param.to(shadow_ptr.dtype.element_ty)
        tl.store(shadow_ptr + slot * stride_shadow + offset, shadow, mask=mask)
    if ZERO_GRAD:
        tl.store(grad_ptrs, tl.zeros((BLOCK,), grad_ptr.dtype.element_ty), mask=mask)


@register(SCHEMA, in_place)
def sgd_rows(
    param: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None,
    shadow: Tensor | None,
    slots: Tensor,
    lr: Tensor,
    clip: Tensor,
    step: Tensor,
    momentum: float,
    weight_decay: float,
    zero_grad: bool,
) -> None:
    """The Triton path of `sgd`."""
    launch(
        sgd_kernel,
        piece_grid(slots.shape[0], param.shape[1], BLOCK),
        param,
        grad,
        momentum_buffer,
        shadow,
        slots,
        lr,
        clip,
        step,
        param.shape[0],
        param.stride(0),
        grad.stride(0),
        0 if momentum_buffer is None else momentum_buffer.stride(0),
        0 if shadow is None else shadow.stride(0),
        param.shape[1],
        momentum,
        weight_decay,
        BLOCK=BLOCK,
        MOMENTUM=momentum_buffer is not None,
        SHADOW=shadow is not None,
        ZERO_GRAD=zero_grad,
        num_warps=4,
    )
