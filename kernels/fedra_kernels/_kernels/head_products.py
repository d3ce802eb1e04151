"""Grouped logits under each group's own classifier and their gradients, by Triton or by torch.

The torch path is batched products over runs of equal group sizes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import dot_precision, in_place, launch, register, use_triton
from ..groups import RowGroups, add_to_bank, bank_rows, grouped
from .configs import ConfigTable, Tile, choose
from .row_tables import load_chunk, load_filled

PRODUCT_SCHEMA = "head_product(Tensor x, Tensor weight, Tensor? bias, Tensor chunks, bool transposed) -> Tensor"
GRADS_SCHEMA = (
    "head_grads(Tensor features, Tensor grad_logits, Tensor filled, Tensor(a!) grad_weight, Tensor(b!) grad_bias) -> ()"
)

# Shared by the product and the sink gradients: rows, classes, features.
CONFIGS: ConfigTable = {
    "sm_80": {"narrow": Tile(64, 64, 64, 4, 3), "float": Tile(32, 32, 32, 4, 2)},
    "sm_90": {"narrow": Tile(64, 64, 64, 4, 4), "float": Tile(32, 32, 32, 4, 2)},
    "sm_100": {"narrow": Tile(64, 64, 64, 8, 3), "float": Tile(32, 32, 32, 4, 2)},
    "gfx942": {"narrow": Tile(64, 64, 64, 4, 2), "float": Tile(32, 32, 32, 4, 2)},
    "small": {"narrow": Tile(64, 64, 64, 4, 3), "float": Tile(32, 32, 32, 4, 2)},
    "interpreter": dict.fromkeys(("narrow", "float"), Tile(16, 16, 32, 4, 1)),
}


def product_tile(x: Tensor) -> Tile:
    """The tile of the head's products, of x or the gradient of the logits: both have one dtype."""
    return choose(CONFIGS, x, 1)


@triton.jit(do_not_specialize=["chunks_ptr"])
def head_product_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    chunks_ptr,
    stride_slot,
    stride_n,
    stride_k,
    stride_bias,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program makes one tile of a chunk's product."""
    first, end, slot, _, _ = load_chunk(chunks_ptr, tl.program_id(0))
    row = first + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    row_mask = (row < end)[:, None]
    column_mask = (column < N)[None, :]
    x_ptrs = x_ptr + row.to(tl.int64)[:, None] * K + depth[None, :]
    # A vocabulary's classifier may have more than 2^31 entries.
    weight_offset = column.to(tl.int64)[None, :] * stride_n + depth.to(tl.int64)[:, None] * stride_k
    weight_ptrs = weight_ptr + slot * stride_slot + weight_offset
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        inside = k + depth < K
        x = tl.load(x_ptrs, mask=row_mask & inside[None, :], other=0.0)
        weight = tl.load(weight_ptrs, mask=column_mask & inside[:, None], other=0.0)
        total = tl.dot(x, weight, total, input_precision=PRECISION)
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K * stride_k
    if HAS_BIAS:
        bias = tl.load(bias_ptr + slot * stride_bias + column[None, :], mask=column_mask, other=0.0)
        total += bias.to(tl.float32)
    y_ptrs = y_ptr + row.to(tl.int64)[:, None] * N + column[None, :]
    tl.store(y_ptrs, total.to(y_ptr.dtype.element_ty), mask=row_mask & column_mask)


@triton.jit(do_not_specialize=["filled_ptr"])
def head_grads_kernel(
    features_ptr,
    grad_logits_ptr,
    grad_weight_ptr,
    grad_bias_ptr,
    filled_ptr,
    stride_weight,
    stride_bias,
    CLASSES: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program adds one group's rows, in order, for one tile of the classifier."""
    start, end, slot, _ = load_filled(filled_ptr, tl.program_id(0))
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    weight_total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    bias_total = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(start, end, BLOCK_M):
        row = first + tl.arange(0, BLOCK_M)
        row_mask = (row < end)[:, None]
        row_offset = row.to(tl.int64)[:, None]
        gradient = tl.load(
            grad_logits_ptr + row_offset * CLASSES + column[None, :],
            mask=row_mask & (column < CLASSES)[None, :],
            other=0.0,
        )
        features = tl.load(
            features_ptr + row_offset * K + depth[None, :], mask=row_mask & (depth < K)[None, :], other=0.0
        )
        weight_total = tl.dot(tl.trans(gradient), features, weight_total, input_precision=PRECISION)
        bias_total += tl.sum(gradient.to(tl.float32), axis=0)
    weight_ptrs = grad_weight_ptr + slot * stride_weight + column.to(tl.int64)[:, None] * K + depth[None, :]
    mask = (column < CLASSES)[:, None] & (depth < K)[None, :]
    weight_total += tl.load(weight_ptrs, mask=mask, other=0.0).to(tl.float32)
    tl.store(weight_ptrs, weight_total.to(grad_weight_ptr.dtype.element_ty), mask=mask)
    if tl.program_id(2) == 0:
        bias_ptrs = grad_bias_ptr + slot * stride_bias + column
        bias_total += tl.load(bias_ptrs, mask=column < CLASSES, other=0.0).to(tl.float32)
        tl.store(bias_ptrs, bias_total.to(grad_bias_ptr.dtype.element_ty), mask=column < CLASSES)


def _fake_product(x: Tensor, weight: Tensor, bias: Tensor | None, chunks: Tensor, transposed: bool) -> Tensor:
    dtype = x.dtype if transposed else torch.float32
    return x.new_empty(x.shape[0], weight.shape[2 if transposed else 1], dtype=dtype)


@register(PRODUCT_SCHEMA, _fake_product)
def head_product(x: Tensor, weight: Tensor, bias: Tensor | None, chunks: Tensor, transposed: bool) -> Tensor:
    """Logits x W_k^T + b_k in fp32; `transposed`: the features' gradient x W_k in x's dtype.

    x [samples, in], weight [slots, classes, in] (transposed: x [samples, classes]);
    chunks: `RowGroups.chunks(product_tile(x).rows).rows`.
    """
    tile = product_tile(x)
    y = _fake_product(x, weight, bias, chunks, transposed)
    n_dim, k_dim = (2, 1) if transposed else (1, 2)
    launch(
        head_product_kernel,
        (chunks.shape[0], triton.cdiv(y.shape[1], tile.columns)),
        x,
        weight,
        bias,
        y,
        chunks,
        weight.stride(0),
        weight.stride(n_dim),
        weight.stride(k_dim),
        0 if bias is None else bias.stride(0),
        N=y.shape[1],
        K=x.shape[1],
        HAS_BIAS=bias is not None,
        PRECISION=dot_precision(x),
        **tile.product_options,
    )
    return y


@register(GRADS_SCHEMA, in_place)
def head_grads(features: Tensor, grad_logits: Tensor, filled: Tensor, grad_weight: Tensor, grad_bias: Tensor) -> None:
    """Add each group's classifier gradients into its slot of the sinks."""
    tile = product_tile(features)
    classes, inputs = grad_weight.shape[1:]
    launch(
        head_grads_kernel,
        (filled.shape[0], triton.cdiv(classes, tile.columns), triton.cdiv(inputs, tile.depth)),
        features,
        grad_logits,
        grad_weight,
        grad_bias,
        filled,
        grad_weight.stride(0),
        grad_bias.stride(0),
        CLASSES=classes,
        K=inputs,
        PRECISION=dot_precision(features),
        **tile.product_options,
    )


def group_logits(features: Tensor, weight: Tensor, bias: Tensor, groups: RowGroups) -> Tensor:
    """[samples, classes] under each group's own classifier: fp32 from Triton, in the features' dtype from torch."""
    if use_triton(features):
        chunks = groups.chunks(product_tile(features).rows).rows
        return head_product(features, weight, bias, chunks, False)
    logits = features.new_empty(len(features), weight.shape[1])
    for run in groups.runs:
        torch.baddbmm(
            bank_rows(bias, run.slots)[:, None],
            grouped(features, run),
            bank_rows(weight, run.slots).transpose(1, 2),
            out=grouped(logits, run),
        )
    return logits


def group_gradients(
    features: Tensor,
    grad_logits: Tensor,
    weight: Tensor,
    groups: RowGroups,
    grad_weight: Tensor,
    grad_bias: Tensor,
    needs_features: bool,
) -> Tensor | None:
    """Add the gradients of the classifiers into the sinks; returns that of the features, or None where not needed."""
    if use_triton(features):
        head_grads(features, grad_logits, groups.filled, grad_weight, grad_bias)
        if not needs_features:
            return None
        chunks = groups.chunks(product_tile(features).rows).rows
        return head_product(grad_logits, weight, None, chunks, True)
    grad_features = grad_logits.new_empty(len(grad_logits), weight.shape[2]) if needs_features else None
    for run in groups.runs:
        run_grad = grouped(grad_logits, run)
        product = torch.bmm(run_grad.transpose(1, 2), grouped(features, run))
        add_to_bank(grad_weight, run.slots, product)
        add_to_bank(grad_bias, run.slots, run_grad.sum(1, dtype=grad_bias.dtype))
        if grad_features is not None:
            torch.bmm(run_grad, bank_rows(weight, run.slots), out=grouped(grad_features, run))
    return grad_features
