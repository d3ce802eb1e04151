"""Sums of squares of bank rows, for clipping each client's gradient, and of how far they have moved."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._kernels.checks import check_bank, check_float, check_index, check_like, check_shape
from .dispatch import launch, register, use_triton
from .groups import SlotIndex, bank_rows, slot_chunks

SCHEMA = "squared_norms(Tensor grad, Tensor slots) -> Tensor"
BLOCK = 2048
_CACHED = 1 << 18
"""Entries of a bank in a piece: a megabyte in float32, which a CPU's second cache holds. Half as much took a tenth
longer on an EPYC, as each piece is a few calls; twice as much was as fast (by hand, the embedded model's slots)."""


def squared_norms(grad: Tensor, slots: Tensor) -> Tensor:
    """[n] sums of squares of the bank rows `slots` of grad [slots, P], a bank or some columns of one.

    slots: int64 [n]. On a GPU its values are not checked: a slot outside the bank gives NaN. The sums are fp64, so
    that no finite fp32 gradient has an infinite one.

    Raises:
        ValueError: a shape, dtype, device or slot does not fit.
    """
    check_shape("grad", grad, (None, None))
    check_float("grad", grad)
    check_bank("grad", grad)
    check_index("slots", slots, "grad", grad)
    if use_triton(grad):
        return squared_norms_rows(grad, slots)
    if not len(slots):
        return torch.zeros(0, dtype=torch.float64, device=grad.device)
    low, high = (int(bound) for bound in torch.aminmax(slots))
    if high - low < 2 * len(slots):
        # Reading the rows between is cheaper than copying those that are asked for.
        norms = torch.linalg.vector_norm(grad[low : high + 1], dim=1, dtype=_norm_dtype(grad))[slots - low]
    else:
        norms = torch.empty(slots.shape, dtype=_norm_dtype(grad), device=grad.device)
        for rows, index in slot_chunks(slots, grad.shape[1]):
            torch.linalg.vector_norm(bank_rows(grad, index), dim=1, dtype=norms.dtype, out=norms[rows])
    return _squares(norms, lambda row: grad[int(slots[row])])


def squared_changes(after: Tensor, slots: Tensor, before: Tensor, rows: Tensor | None = None) -> Tensor:
    """[n] sums of squares, in fp64, of the bank rows `slots` of after [slots, P] minus `rows` of before.

    Args:
        after: a bank.
        slots: int64 [n], its rows.
        before: [rows, P], dtype of after.
        rows: int64 [n], its rows; all in order if None.

    Raises:
        ValueError: a shape, dtype, device, slot or row does not fit.
    """
    check_shape("after", after, (None, None))
    check_bank("after", after)
    check_float("after", after)
    check_index("slots", slots, "after", after)
    check_shape("before", before, (len(slots) if rows is None else None, after.shape[1]))
    check_like("before", before, "after", after)
    if rows is not None:
        check_index("rows", rows, "before", before)
        check_shape("rows", rows, slots.shape)
    if use_triton(after):
        start = before if rows is None else before.index_select(0, rows)
        return squared_norms(after.index_select(0, slots) - start, torch.arange(len(slots), device=slots.device))
    norms = torch.empty(slots.shape, dtype=_norm_dtype(after))

    def change(piece: slice, index: SlotIndex) -> Tensor:
        if rows is None:
            return before[piece] - bank_rows(after, index)
        return before.index_select(0, rows[piece]).sub_(bank_rows(after, index))

    for piece, index in slot_chunks(slots, after.shape[1], _CACHED):
        torch.linalg.vector_norm(change(piece, index), dim=1, dtype=norms.dtype, out=norms[piece])
    return _squares(norms, lambda row: change(slice(row, row + 1), slots[row : row + 1])[0])


def _norm_dtype(values: Tensor) -> torch.dtype:
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def _squares(norms: Tensor, row_of: Callable[[int], Tensor]) -> Tensor:
    """The squares of `norms` [n] in fp64, of which those that are not finite are computed anew from their rows."""
    wide = norms.double()
    # In fp64 from the start would take nine times as long, and hardly any row needs it.
    for row in torch.nonzero(~norms.isfinite())[:, 0].tolist():
        wide[row] = torch.linalg.vector_norm(row_of(row), dtype=torch.float64)
    return wide.square_()


def squared_changes_reference(after: Tensor, slots: Tensor, before: Tensor, rows: Tensor) -> Tensor:
    """The same sums as of `squared_changes`, in plain torch."""
    return (after[slots].double() - before[rows].double()).square().sum(1)


def squared_norms_reference(grad: Tensor, slots: Tensor) -> Tensor:
    """The same sums in plain torch."""
    return grad[slots].double().square().sum(1)


@triton.jit(do_not_specialize=["slots_ptr", "slot_count"])
def squared_norms_kernel(grad_ptr, slots_ptr, norms_ptr, slot_count, stride_slot, entries, BLOCK: tl.constexpr):
    """One program adds one row in a fixed order."""
    number = tl.program_id(0)
    slot = tl.load(slots_ptr + number)
    known = (slot >= 0) & (slot < slot_count)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, entries, BLOCK):
        offset = start + tl.arange(0, BLOCK)
        mask = (offset < entries) & known
        grad = tl.load(grad_ptr + slot * stride_slot + offset, mask=mask, other=0.0).to(tl.float64)
        total += grad * grad
    tl.store(norms_ptr + number, tl.where(known, tl.sum(total, axis=0), float("nan")))


def _fake(grad: Tensor, slots: Tensor) -> Tensor:
    return grad.new_empty(slots.shape, dtype=torch.float64)


@register(SCHEMA, _fake)
def squared_norms_rows(grad: Tensor, slots: Tensor) -> Tensor:
    """The Triton path of `squared_norms`."""
    norms = _fake(grad, slots)
    launch(
        squared_norms_kernel,
        slots.shape,
        grad,
        slots,
        norms,
        grad.shape[0],
        grad.stride(0),
        grad.shape[1],
        BLOCK=BLOCK,
        num_warps=8,
        num_stages=3,
    )
    return norms
