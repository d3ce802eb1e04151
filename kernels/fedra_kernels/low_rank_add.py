"""Add a frozen affine low-rank map of some rows of the residual stream to these rows, in place."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._kernels.checks import check_index, check_like, check_shape, check_stream, stream_rows
from ._kernels.configs import MAX_RANK, ConfigTable, Tile, choose, low_rank_options
from .dispatch import in_place, launch, register, untraced, use_triton

SCHEMA = "low_rank_add_(Tensor(a!) stream, Tensor index, Tensor down, Tensor up, Tensor? shift, Tensor? bias) -> ()"

SHORTEST_RUN = 32
"""Consecutive rows, on average, from which a CPU multiplies in place instead of gathering rows.

Forward and backward of 544 of 1,088 rows of 384 features at rank 32 took 6.1 ms in place and 4.1 ms gathered in runs of
17 rows, 4.0 and 4.6 ms in runs of 34, and 3.7 and 4.7 ms in runs of 136 (one thread of a Xeon at 2.5 GHz).
"""
# Rows, features; one block holds the whole rank.
CONFIGS: ConfigTable = {
    "sm_80": {"narrow": Tile(128, 64, 1, 8, 3), "wide": Tile(64, 64, 1, 8, 2), "float": Tile(32, 32, 1, 8, 2)},
    "sm_90": {"narrow": Tile(128, 64, 1, 8, 3), "wide": Tile(64, 64, 1, 8, 3), "float": Tile(32, 32, 1, 8, 2)},
    "sm_100": {"narrow": Tile(128, 64, 1, 8, 3), "wide": Tile(64, 64, 1, 8, 2), "float": Tile(32, 32, 1, 8, 2)},
    "gfx942": {"narrow": Tile(64, 64, 1, 4, 2), "wide": Tile(64, 64, 1, 8, 2), "float": Tile(32, 32, 1, 8, 2)},
    "small": {"narrow": Tile(64, 64, 1, 4, 3), "wide": Tile(64, 64, 1, 8, 2), "float": Tile(32, 32, 1, 8, 2)},
    "interpreter": dict.fromkeys(("narrow", "wide", "float"), Tile(16, 32, 1, 4, 1)),
}


def low_rank_add(stream: Tensor, index: Tensor, down: Tensor, up: Tensor, shift: Tensor, bias: Tensor) -> Tensor:
    """stream[index] += (stream[index] @ down + shift) @ up + bias, in place; returns stream.

    A frozen approximation of a transformer block, h + (h - mu) M + b with M = down @ up and shift = -mu @ down, for
    the rows of clients that do not hold the block. Products are summed in float32 (float64 for float64); the shifted
    rows of the lower rank are rounded to the stream's dtype before the second product, as in `lora_linear`.

    Args:
        stream: [rows of the stream, features] or [samples, ..., features], whose leading dimensions, flattened,
            are the rows of the stream; contiguous. Updated in place, as autograd allows for any tensor that is not
            a leaf. Give the stream itself, not a view of it: for a view, autograd copies the whole gradient.
        index: int64 [rows], unique rows of the stream. On a GPU its values are not checked: a row outside
            the stream is left out.
        down: [features, rank]. up: [rank, features]. shift: [rank]. bias: [features]. They get no gradient;
            the rank is at most 128; with rank 0 the bias is all that is added.

    Raises:
        ValueError: a shape, dtype, device or row number does not fit.
    """
    check_stream("stream", stream)
    check_index("index", index, "stream", stream_rows(stream.detach()))
    features = stream.shape[-1]
    check_shape("up", up, (None, features))
    rank = up.shape[0]
    if rank > MAX_RANK:
        raise ValueError(f"up: found rank {rank}, expected at most {MAX_RANK}")
    frozen = (("up", up, (rank, features)), ("down", down, (features, rank)), ("shift", shift, (rank,)))
    for name, tensor, shape in (*frozen, ("bias", bias, (features,))):
        check_shape(name, tensor, shape)
        check_like(name, tensor, "stream", stream)
    return _apply(stream, index, down, up, shift, bias)


def low_rank_add_reference(
    stream: Tensor, index: Tensor, down: Tensor, up: Tensor, shift: Tensor, bias: Tensor
) -> Tensor:
    """The same sum in a new tensor, differentiable in every tensor."""
    rows = stream_rows(stream)
    added = (rows[index] @ down + shift) @ up + bias
    return rows.index_add(0, index, added).view(stream.shape)


@untraced
def _apply(*arguments: Tensor) -> Tensor:
    """Compiled, torch 2.13 passes the gradient of a tensor marked dirty on as it is, past `backward`."""
    added: Tensor = _LowRankAdd.apply(*arguments)
    return added


class _LowRankAdd(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, stream: Tensor, index: Tensor, down: Tensor, up: Tensor, shift: Tensor, bias: Tensor
    ) -> Tensor:
        ctx.mark_dirty(stream)
        ctx.save_for_backward(index, down, up)
        _add(stream_rows(stream), index, down, up, shift.contiguous(), bias.contiguous())
        return stream

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        index, down, up = ctx.saved_tensors
        # Others may hold the same gradient: autograd hands one tensor to all that add to a sum.
        grad = grad.clone(memory_format=torch.contiguous_format)
        _add(stream_rows(grad), index, up.T, down.T, None, None)
        return grad, *([None] * 5)


def _add(stream: Tensor, index: Tensor, down: Tensor, up: Tensor, shift: Tensor | None, bias: Tensor | None) -> None:
    if use_triton(stream):
        low_rank_add_rows(stream, index, down, up, shift, bias)
        return
    runs = _runs(index) if len(index) else []
    if len(index) < SHORTEST_RUN * len(runs):
        rows = stream.index_select(0, index)
        _add_to(rows, down, up, shift, bias)
        stream.index_copy_(0, index, rows)
        return
    # The rows of a client are neighbours, which need not be gathered.
    for start, end in runs:
        _add_to(stream[start:end], down, up, shift, bias)


def _add_to(rows: Tensor, down: Tensor, up: Tensor, shift: Tensor | None, bias: Tensor | None) -> None:
    shrunk = rows @ down if shift is None else torch.addmm(shift, rows, down)
    rows.addmm_(shrunk, up)
    if bias is not None:
        rows += bias


def _runs(index: Tensor) -> list[tuple[int, int]]:
    """Start and end of each run of consecutive numbers in `index`, which is not empty."""
    numbers = index.numpy()
    last = np.flatnonzero(numbers[1:] - numbers[:-1] != 1).tolist()
    ends = [*last, len(numbers) - 1]
    return [(int(numbers[a]), int(numbers[b]) + 1) for a, b in zip([0, *(i + 1 for i in last)], ends, strict=True)]


@triton.jit(do_not_specialize=["index_ptr", "rows", "stream_rows"])
def low_rank_add_kernel(
    stream_ptr,
    index_ptr,
    down_ptr,
    up_ptr,
    shift_ptr,
    bias_ptr,
    rows,
    stream_rows,
    stride_down_feature,
    stride_down_rank,
    stride_up_rank,
    stride_up_feature,
    D: tl.constexpr,
    RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    AFFINE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program updates one block of rows: once over their pieces for the lower rank, once, from cache, to add."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    target = tl.load(index_ptr + row, mask=row < rows, other=-1)
    inside = ((target >= 0) & (target < stream_rows))[:, None]
    target_ptrs = stream_ptr + target[:, None] * D
    piece = tl.arange(0, BLOCK_D)
    rank = tl.arange(0, RANK_BLOCK)
    known = rank < RANK
    total = tl.zeros((BLOCK_M, RANK_BLOCK), tl.float32)
    for d in range(0, D, BLOCK_D):
        column = d + piece
        values = tl.load(target_ptrs + column[None, :], mask=inside & (column < D)[None, :], other=0.0)
        down_ptrs = down_ptr + column[:, None] * stride_down_feature + rank[None, :] * stride_down_rank
        down = tl.load(down_ptrs, mask=(column < D)[:, None] & known[None, :], other=0.0)
        total = tl.dot(values, down, total, input_precision=PRECISION)
    if AFFINE:
        total += tl.load(shift_ptr + rank, mask=known, other=0.0).to(tl.float32)[None, :]
    shrunk = total.to(stream_ptr.dtype.element_ty)
    for d in range(0, D, BLOCK_D):
        column = d + piece
        up_ptrs = up_ptr + rank[:, None] * stride_up_rank + column[None, :] * stride_up_feature
        up = tl.load(up_ptrs, mask=known[:, None] & (column < D)[None, :], other=0.0)
        added = tl.dot(shrunk, up, input_precision=PRECISION)
        if AFFINE:
            added += tl.load(bias_ptr + column, mask=column < D, other=0.0).to(tl.float32)[None, :]
        mask = inside & (column < D)[None, :]
        added += tl.load(target_ptrs + column[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(target_ptrs + column[None, :], added.to(stream_ptr.dtype.element_ty), mask=mask)


@register(SCHEMA, in_place)
def low_rank_add_rows(
    stream: Tensor, index: Tensor, down: Tensor, up: Tensor, shift: Tensor | None, bias: Tensor | None
) -> None:
    """stream[index] += (stream[index] @ down + shift) @ up + bias for contiguous stream [stream rows, features].

    down and up may be transposes; shift and bias are contiguous, or both None for 0.
    """
    rank = up.shape[0]
    tile = choose(CONFIGS, stream, rank)
    launch(
        low_rank_add_kernel,
        (triton.cdiv(index.shape[0], tile.rows),),
        stream,
        index,
        down,
        up,
        shift,
        bias,
        index.shape[0],
        stream.shape[0],
        *down.stride(),
        *up.stride(),
        D=stream.shape[1],
        BLOCK_M=tile.rows,
        BLOCK_D=tile.columns,
        AFFINE=shift is not None,
        **low_rank_options(stream, rank),
        **tile.options,
    )
