"""Attention without masks on a CPU, forward and backward, outside of autograd.

Two implementations: torch's fused kernel, and batched products with a softmax between them. In bfloat16 the fused
kernel took 4 to 7 times as long for 17 to 65 tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .computed_rows import ComputedRows


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, computed: ComputedRows, *, fused: bool
) -> tuple[Tensor, list[list[Tensor]]]:
    """Softmax(scale Q K^T) V for q, k and v [samples, tokens, heads, head size].

    Returns the rows that are computed, [rows, heads × head size], and what backward needs.
    """
    if not computed.first_token_samples:
        out, saved = _attend(q, k, v, scale, fused=fused)
        return out, [saved]
    outs, parts = [], []
    for samples, queries in _parts(computed):
        out, saved = _attend(q[samples, queries], k[samples], v[samples], scale, fused=fused)
        outs.append(out)
        parts.append(saved)
    return outs[0] if len(outs) == 1 else torch.cat(outs), parts


def attend_backward(
    grad: Tensor,
    saved: Sequence[Sequence[Tensor]],
    scale: float,
    computed: ComputedRows,
    grads: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Write the gradients of q, k and v, shaped as these, from `grad` of the output and from what `attend` saved."""
    if not computed.first_token_samples:
        _attend_backward(grad, saved[0], scale, grads)
        return
    grads[0][computed.full_samples :, 1:].zero_()
    first = 0
    for of_part, (samples, queries) in zip(saved, _parts(computed), strict=True):
        targets = (grads[0][samples, queries], grads[1][samples], grads[2][samples])
        count = targets[0].shape[0] * targets[0].shape[1]
        _attend_backward(grad[first : first + count], of_part, scale, targets)
        first += count


def _parts(computed: ComputedRows) -> list[tuple[slice, slice]]:
    """Samples, and their tokens that are computed: of full samples, if there are any, and of the others."""
    full, every = slice(computed.full_samples), slice(None)
    return [*([(full, every)] if computed.full_samples else []), (slice(computed.full_samples, None), slice(1))]


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, *, fused: bool) -> tuple[Tensor, list[Tensor]]:
    """Softmax(scale Q K^T) V for q, k and v [samples, tokens, heads, head size]; q may have fewer tokens.

    Returns the output [samples × tokens, heads × head size], and what backward needs.
    """
    samples, tokens, heads, size = q.shape
    if fused:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out, logs = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, scale=scale)
        return out.transpose(1, 2).reshape(samples * tokens, heads * size), [q, k, v, out, logs]
    q, k, v = map(_by_head, (q, k, v))
    scores = torch.baddbmm(q.new_empty(1, 1, 1), q, k.transpose(1, 2), beta=0, alpha=scale)
    # A softmax of few columns in 16 bits is several times slower than in 32, and less exact.
    weights = torch.softmax(scores, -1, dtype=_wide(q)).to(q.dtype)
    out = torch.bmm(weights, v).view(samples, heads, tokens, size).transpose(1, 2)
    return out.reshape(samples * tokens, heads * size), [q, k, v, weights]


def _attend_backward(grad: Tensor, saved: Sequence[Tensor], scale: float, grads: tuple[Tensor, Tensor, Tensor]) -> None:
    """Write the gradients of q, k and v, shaped as these, from `grad` of the output and from what `_attend` saved."""
    q, k, v, *others = saved
    if len(others) == 2:
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        found = backward(grad.view(grads[0].shape).transpose(1, 2), q, k, v, *others, 0.0, False, scale=scale)
        for target, values in zip(grads, found, strict=True):
            target.copy_(values.transpose(1, 2))
        return
    (weights,) = others
    grad = _by_head(grad.view(grads[0].shape))
    of_weights = torch.bmm(grad, v.transpose(1, 2))
    wide = _wide(q)
    of_scores = torch._softmax_backward_data(of_weights.to(wide), weights.to(wide), -1, wide).mul_(scale).to(q.dtype)
    pairs = ((of_scores, k), (of_scores.transpose(1, 2), q), (weights.transpose(1, 2), grad))
    for target, (left, right) in zip(grads, pairs, strict=True):
        samples, tokens, heads, size = target.shape
        target.copy_(torch.bmm(left, right).view(samples, heads, tokens, size).transpose(1, 2))


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _by_head(x: Tensor) -> Tensor:
    """[samples, tokens, heads, size] as [samples × heads, tokens, size], a copy."""
    samples, tokens, heads, size = x.shape
    return x.transpose(1, 2).reshape(samples * heads, tokens, size)
