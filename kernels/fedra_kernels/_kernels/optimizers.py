"""What `sgd` and `adamw` share: their checks, and their torch path, torch's fused optimizer kernels on bank rows.

Rows one after the other whose clients are at the same step are one tensor for the fused kernel, which walks over all
its arguments once. The fused and foreach functions are those that torch.optim itself is made of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from .checks import check_bank, check_device, check_dtype, check_float, check_index, check_shape

_BATCH_ENTRIES = 1 << 20
"""Entries of a bank stepped at a time: what is scaled, stepped and zeroed then stays in a cache."""


def check_step(
    param: Tensor,
    states: Mapping[str, Tensor | None],
    shadow: Tensor | None,
    slots: Tensor,
    lr: Tensor,
    clip: Tensor,
    step: Tensor,
) -> None:
    """Raise ValueError unless the arguments of one step of bank rows fit param [slots, P].

    states: the gradient and what else is shaped as param.
    """
    check_shape("param", param, (None, None))
    check_float("param", param)
    check_index("slots", slots, "param", param)
    if slots.device.type == "cpu" and len(set(slots.tolist())) != len(slots):
        raise ValueError(f"slots: found a slot twice in {slots.tolist()}, expected distinct slots")
    for name, tensor in {"param": param, **states, "shadow": shadow}.items():
        if tensor is None:
            continue
        check_shape(name, tensor, param.shape)
        check_device(name, tensor, "param", param)
        check_bank(name, tensor)
        of_shadow = (torch.bfloat16, torch.float16)
        check_dtype(name, tensor, of_shadow if name == "shadow" else (param.dtype, torch.float32))
    rates = torch.float64 if param.dtype == torch.float64 else torch.float32
    for name, table, dtype in (("lr", lr, rates), ("clip", clip, rates), ("step", step, torch.int64)):
        check_shape(name, table, slots.shape)
        check_dtype(name, table, (dtype,))
        check_device(name, table, "param", param)


def step_rows(
    param: Tensor,
    grad: Tensor,
    states: Sequence[Tensor],
    shadow: Tensor | None,
    slots: Tensor,
    lr: Tensor,
    clip: Tensor,
    steps: Tensor,
    zero_grad: bool,
    fused: Callable[..., None],
) -> None:
    """Call `fused` on lists of contiguous tensors that hold the bank rows `slots` of param, grad and each state.

    `fused(params, grads, *states, lr=, steps=)` works in place on tensors of one dtype: float64 for float64
    parameters, else float32; other banks are converted before and after. Its grads are times clip. Its steps are those
    of the rows, one number a tensor; at a first step the states are set to zero before.
    """
    dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
    slots, order = torch.sort(slots)
    clip = clip[order]
    rows, rates = slots.tolist(), lr[order].tolist()
    numbers = steps[order].tolist()
    banks = [param, *states] + ([] if shadow is None else [shadow])
    # In a view of some columns, rows are not next to each other in memory.
    joined = all(bank.is_contiguous() for bank in (grad, *banks))
    clipped = bool((clip != 1.0).any())
    for batch in _batches(rates, max(_BATCH_ENTRIES // max(param.shape[1], 1), 1)):
        runs = _runs(rows[batch], numbers[batch], joined)
        grads = _views(grad, runs)
        scaled = [view.to(dtype) for view in grads]
        if clipped:
            factors = clip[batch, None].split([count for _, count, _ in runs])
            if zero_grad or grad.dtype != dtype:
                torch._foreach_mul_(scaled, factors)
            else:
                scaled = list(torch._foreach_mul(scaled, factors))
        views = [_views(bank, runs) for bank in banks]
        shadows = views.pop() if shadow is not None else ()
        fresh = [view for state in views[1:] for view, (*_, number) in zip(state, runs, strict=True) if number == 1]
        if fresh:
            # Only now, so that they are in a cache when the step needs them.
            torch._foreach_zero_(fresh)
        wide = [[view.to(dtype) for view in bank_views] for bank_views in views]
        fused(wide[0], scaled, *wide[1:], lr=rates[batch.start], steps=[number for *_, number in runs])
        for bank_views, results in zip(views, wide, strict=True):
            if bank_views[0].dtype != dtype:
                torch._foreach_copy_(bank_views, results)
        if shadows:
            torch._foreach_copy_(shadows, wide[0])
        if zero_grad:
            torch._foreach_zero_(grads)


def _batches(rates: Sequence[float], longest: int) -> Iterator[slice]:
    """Cut the entries into slices of at most `longest` of one rate."""
    start = 0
    for end in range(1, len(rates) + 1):
        if end == len(rates) or end - start == longest or rates[end] != rates[start]:
            yield slice(start, end)
            start = end


def _runs(rows: Sequence[int], numbers: Sequence[int], joined: bool) -> list[tuple[int, int, int]]:
    """(first row, rows, number) of each run of consecutive rows of one number; of each row unless joined."""
    runs: list[tuple[int, int, int]] = []
    for row, number in zip(rows, numbers, strict=True):
        if runs and joined:
            first, count, last = runs[-1]
            if row == first + count and number == last:
                runs[-1] = (first, count + 1, number)
                continue
        runs.append((row, 1, number))
    return runs


def _views(bank: Tensor, runs: Sequence[tuple[int, int, int]]) -> tuple[Tensor, ...]:
    """The bank's rows of each run; by one split, since a slice for each costs more than the step of a short run."""
    sizes, position = [], 0
    for first, count, _ in runs:
        sizes += [first - position, count]
        position = first + count
    return bank.split([*sizes, len(bank) - position])[1::2]
