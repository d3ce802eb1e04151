"""SGD over bank slots, each with its own learning rate and clip factor, in place."""

from __future__ import annotations

import torch
from torch import Tensor

from .groups import bank_rows, slot_chunks
from .optimizer_checks import check_bank_state, check_per_slot


def sgd(
    param: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None,
    slots: Tensor,
    lr: Tensor,
    clip: Tensor,
    *,
    momentum: float,
    weight_decay: float,
) -> None:
    """One step of torch.optim.SGD (dampening 0, no Nesterov) on the bank rows `slots`.

    g = clip_i * grad + weight_decay * param; buffer = momentum * buffer + g; param -= lr_i * buffer.

    Args:
        param, grad, momentum_buffer: [slots, P]; param and buffer are updated in place. A buffer of zeros
            is a fresh one. momentum_buffer is None exactly when momentum is 0.
        slots: int64 [n], distinct bank rows.
        lr, clip: [n], fp32 (fp64 for fp64 banks).

    Raises:
        ValueError: a shape, dtype, device or slot does not fit.
    """
    check_bank_state(param, grad, slots, {"momentum_buffer": momentum_buffer} if momentum else {})
    check_per_slot(param, slots, {"lr": lr, "clip": clip})
    if (momentum_buffer is None) != (momentum == 0.0):
        found = "None" if momentum_buffer is None else "a tensor"
        raise ValueError(f"momentum_buffer: found {found}, expected None exactly when momentum is 0")
    for rows, index in slot_chunks(slots, param.shape[1]):
        weights = bank_rows(param, index)
        step = bank_rows(grad, index) * clip[rows, None]
        step.add_(weights, alpha=weight_decay)
        if momentum_buffer is not None:
            buffer = bank_rows(momentum_buffer, index)
            step = buffer.mul_(momentum).add_(step)
            if not isinstance(index, slice):
                momentum_buffer.index_copy_(0, index, buffer)
        weights.addcmul_(step, lr[rows, None], value=-1.0)
        if not isinstance(index, slice):
            param.index_copy_(0, index, weights)


def sgd_reference(
    param: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor,
    lr: Tensor,
    clip: Tensor,
    *,
    momentum: float,
    weight_decay: float,
) -> tuple[Tensor, Tensor]:
    """New (param, momentum buffer) of rows [n, P], with lr and clip [n], in plain torch."""
    buffer = momentum * momentum_buffer + clip[:, None] * grad + weight_decay * param
    return param - lr[:, None] * buffer, buffer
