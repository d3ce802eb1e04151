"""AdamW over bank slots, each with its own learning rate, clip factor and step number, in place."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._kernels.optimizers import check_step, step_rows
from ._kernels.row_tables import bank_piece, piece_grid
from .dispatch import in_place, launch, register, use_triton

SCHEMA = (
    "adamw_(Tensor(a!) param, Tensor(b!) grad, Tensor(c!) exp_avg, Tensor(d!) exp_avg_sq, Tensor(e!)? shadow, "
    "Tensor slots, Tensor lr, Tensor clip, Tensor step, float beta1, float beta2, float eps, "
    "float weight_decay, bool zero_grad) -> ()"
)
BLOCK = 1024


def adamw(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    slots: Tensor,
    lr: Tensor,
    clip: Tensor,
    step: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    shadow: Tensor | None = None,
    zero_grad: bool = False,
) -> None:
    """One step of torch.optim.AdamW (Loshchilov and Hutter, 2019) on the bank rows `slots`.

    Args:
        param, grad, exp_avg, exp_avg_sq: [slots, P], or the same columns of wider banks; all but grad are
            updated in place. All but param may be fp32 where param is a 16-bit bank. What the moments of a slot
            hold before its first step does not count: they begin with zeros.
        slots: int64 [n], distinct bank rows. On a GPU its values are not checked: a slot outside the bank
            is left out.
        lr, clip: [n], fp32 (fp64 for fp64 banks); the gradient is multiplied by clip.
        step: int64 [n], the number of the step, from 1, of each slot's client.
        shadow: 16-bit copy [slots, P] of param, kept up to date, or None.
        zero_grad: also set the rows `slots` of grad to zero, once used, in the same pass.

    Raises:
        ValueError: a shape, dtype, device, slot or beta does not fit.
    """
    states = {"grad": grad, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    check_step(param, states, shadow, slots, lr, clip, step)
    if not all(0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"betas: found {betas}, expected values from 0 to below 1")
    beta1, beta2 = betas
    if use_triton(param):
        adamw_rows(
            param, grad, exp_avg, exp_avg_sq, shadow, slots, lr, clip, step, beta1, beta2, eps, weight_decay, zero_grad
        )
        return

    def fused(params: list[Tensor], grads: list[Tensor], *moments: list[Tensor], lr: float, steps: list[int]) -> None:
        means, squares = moments
        numbers = list(torch.tensor(steps, dtype=torch.float32).unbind())
        torch._fused_adamw_(
            params, grads, means, squares, [], numbers, lr=lr, beta1=beta1, beta2=beta2, eps=eps,
            weight_decay=weight_decay, amsgrad=False, maximize=False,
        )  # fmt: skip

    step_rows(param, grad, (exp_avg, exp_avg_sq), shadow, slots, lr, clip, step, zero_grad, fused)


def adamw_reference(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    lr: Tensor,
    clip: Tensor,
    step: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """New (param, exp_avg, exp_avg_sq) of rows [n, P], with lr, clip and step [n], in plain torch."""
    beta1, beta2 = betas
    gradient = clip[:, None] * grad
    old_mean, old_square = (torch.where(step[:, None] == 1, 0.0, moment) for moment in (exp_avg, exp_avg_sq))
    mean = beta1 * old_mean + (1 - beta1) * gradient
    square = beta2 * old_square + (1 - beta2) * gradient * gradient
    correction1, correction2 = (1 - beta ** step.to(lr.dtype)[:, None] for beta in betas)
    update = (mean / correction1) / ((square / correction2).sqrt() + eps)
    return param * (1 - lr[:, None] * weight_decay) - lr[:, None] * update, mean, square


@triton.jit(do_not_specialize=["slots_ptr", "lr_ptr", "clip_ptr", "step_ptr", "slot_count"])
def adamw_kernel(
    param_ptr,
    grad_ptr,
    mean_ptr,
    square_ptr,
    shadow_ptr,
    slots_ptr,
    lr_ptr,
    clip_ptr,
    step_ptr,
    slot_count,
    stride_param,
    stride_grad,
    stride_mean,
    stride_square,
    stride_shadow,
    entries,
    beta1,
    beta2,
    rest1,
    rest2,
    log_beta1,
    log_beta2,
    eps,
    weight_decay,
    BLOCK: tl.constexpr,
    SHADOW: tl.constexpr,
    ZERO_GRAD: tl.constexpr,
):
    """One program steps one piece of one slot."""
    number, _, offset = bank_piece(entries, BLOCK)
    slot = tl.load(slots_ptr + number)
    mask = (offset < entries) & (slot >= 0) & (slot < slot_count)
    lr = tl.load(lr_ptr + number)
    steps = tl.load(step_ptr + number)
    # The moments of a first step are zeros that nobody had to write.
    old = mask & (steps > 1)
    # In fp64: 1 - beta^step is a small difference.
    step = steps.to(tl.float64)
    correction1 = (1.0 - tl.exp2(step * log_beta1)).to(tl.float32)
    correction2 = (1.0 - tl.exp2(step * log_beta2)).to(tl.float32)
    param_ptrs = param_ptr + slot * stride_param + offset
    mean_ptrs = mean_ptr + slot * stride_mean + offset
    square_ptrs = square_ptr + slot * stride_square + offset
    param = tl.load(param_ptrs, mask=mask, other=0.0).to(tl.float32)
    grad_ptrs = grad_ptr + slot * stride_grad + offset
    grad = tl.load(grad_ptrs, mask=mask, other=0.0).to(tl.float32)
    grad *= tl.load(clip_ptr + number)
    mean = beta1 * tl.load(mean_ptrs, mask=old, other=0.0).to(tl.float32) + rest1 * grad
    square = beta2 * tl.load(square_ptrs, mask=old, other=0.0).to(tl.float32) + rest2 * grad * grad
    denominator = tl.sqrt(square / correction2) + eps
    param = param * (1.0 - lr * weight_decay) - lr * (mean / correction1) / denominator
    tl.store(param_ptrs, param.to(param_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptrs, mean.to(mean_ptr.dtype.element_ty), mask=mask)
    tl.store(square_ptrs, square.to(square_ptr.dtype.element_ty), mask=mask)
    if SHADOW:
        shadow = param.to(shadow_ptr.dtype.element_ty)
        tl.store(shadow_ptr + slot * stride_shadow + offset, shadow, mask=mask)
    if ZERO_GRAD:
        tl.store(grad_ptrs, tl.zeros((BLOCK,), grad_ptr.dtype.element_ty), mask=mask)


@register(SCHEMA, in_place)
def adamw_rows(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    shadow: Tensor | None,
    slots: Tensor,
    lr: Tensor,
    clip: Tensor,
    step: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    zero_grad: bool,
) -> None:
    """The Triton path of `adamw`."""
    launch(
        adamw_kernel,
        piece_grid(slots.shape[0], param.shape[1], BLOCK),
        param,
        grad,
        exp_avg,
        exp_avg_sq,
        shadow,
        slots,
        lr,
        clip,
        step,
        param.shape[0],
        param.stride(0),
        grad.stride(0),
        exp_avg.stride(0),
        exp_avg_sq.stride(0),
        0 if shadow is None else shadow.stride(0),
        param.shape[1],
        beta1,
        beta2,
        1.0 - beta1,
        1.0 - beta2,
        math.log2(beta1) if beta1 else -math.inf,
        math.log2(beta2) if beta2 else -math.inf,
        eps,
        weight_decay,
        BLOCK=BLOCK,
        SHADOW=shadow is not None,
        ZERO_GRAD=zero_grad,
        num_warps=4,
    )
