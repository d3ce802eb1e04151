"""AdamW over bank slots, each with its own learning rate, clip factor and step number, in place."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import FLOAT_DTYPES, check_dtype, check_index, check_shape
from .groups import bank_rows, slot_chunks
from .optimizer_checks import check_bank_state, check_per_slot


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
) -> None:
    """One step of torch.optim.AdamW (Loshchilov and Hutter, 2019) on the bank rows `slots`.

    Args:
        param, grad, exp_avg, exp_avg_sq: [slots, P]; all but grad are updated in place.
        slots: int64 [n], distinct bank rows.
        lr, clip: [n], fp32 (fp64 for fp64 banks); the gradient is multiplied by clip.
        step: int64 [n], the number of the step, from 1, of each slot's client.

    Raises:
        ValueError: a shape, dtype, device or slot does not fit.
    """
    check_bank_state(param, grad, slots, {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq})
    check_per_slot(param, slots, {"lr": lr, "clip": clip})
    check_shape("step", step, slots.shape)
    check_dtype("step", step, (torch.int64,))
    beta1, beta2 = betas
    exponent = step.to(torch.float64)
    step_size = (lr / (1.0 - beta1**exponent))[:, None].to(lr.dtype)
    denominator_scale = (1.0 - beta2**exponent).sqrt()[:, None].to(lr.dtype)
    decay = (1.0 - lr * weight_decay)[:, None]
    for rows, index in slot_chunks(slots, param.shape[1]):
        weights, mean, square = (bank_rows(bank, index) for bank in (param, exp_avg, exp_avg_sq))
        gradient = bank_rows(grad, index) * clip[rows, None]
        mean.lerp_(gradient, 1.0 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1.0 - beta2)
        denominator = square.sqrt().div_(denominator_scale[rows]).add_(eps)
        update = torch.div(mean, denominator, out=gradient).mul_(step_size[rows])
        weights.mul_(decay[rows]).sub_(update)
        if not isinstance(index, slice):
            for bank, values in ((param, weights), (exp_avg, mean), (exp_avg_sq, square)):
                bank.index_copy_(0, index, values)


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
    mean = beta1 * exp_avg + (1 - beta1) * gradient
    square = beta2 * exp_avg_sq + (1 - beta2) * gradient * gradient
    correction1, correction2 = (1 - beta ** step.to(lr.dtype)[:, None] for beta in betas)
    update = (mean / correction1) / ((square / correction2).sqrt() + eps)
    return param * (1 - lr[:, None] * weight_decay) - lr[:, None] * update, mean, square


def squared_norms(grad: Tensor, slots: Tensor) -> Tensor:
    """[n] sums of squares of the bank rows `slots` of grad [slots, P]; fp32, fp64 for an fp64 bank."""
    check_shape("grad", grad, (None, None))
    check_dtype("grad", grad, FLOAT_DTYPES)
    check_index("slots", slots, "grad", grad)
    dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
    norms = torch.empty(slots.shape, dtype=dtype, device=grad.device)
    for rows, index in slot_chunks(slots, grad.shape[1]):
        torch.linalg.vector_norm(bank_rows(grad, index), dim=1, dtype=dtype, out=norms[rows])
    return norms.square_()
