"""A whole pre-norm transformer block with LoRA for many clients as one autograd function, on a CPU.

Autograd then sees one node a block, and no copy is made but those that the products need: the frozen products add the
residual stream themselves, and the gradients of all adapters of a block reach their bank in one addition.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ._kernels.attention import attend, attend_backward
from ._kernels.checks import check_float, check_like, check_shape, check_sink
from ._kernels.shared_input import (
    AdapterColumns,
    Factors,
    FactorViews,
    SharedInput,
    add_low_rank,
    low_rank_backward,
    share_input,
)
from .dropout import Dropout, keep_mask
from .frozen_linear import FrozenLinear
from .groups import RowGroups, add_to_bank, bank_rows


@dataclass(frozen=True)
class LayerNorm:
    """A frozen LayerNorm: weight and bias [features]."""

    weight: Tensor
    bias: Tensor | None
    eps: float


@dataclass(frozen=True)
class PreNormBlock:
    """The frozen parts of a block: x += scale1 · attention(norm1(x)); x += scale2 · fc2(GELU(fc1(norm2(x)))).

    Attributes:
        inputs: the Linears of query, key and value; or one for all three, whose outputs lie one after another.
        output: the attention's last Linear.
        scale1, scale2: LayerScale [features], or None for 1.
        heads: number of attention heads.
        attention_scale: what the products of queries and keys are multiplied by.
        fused_attention: use torch's fused kernel instead of batched products; the results differ by rounding.
    """

    norm1: LayerNorm
    inputs: tuple[FrozenLinear, ...]
    output: FrozenLinear
    scale1: Tensor | None
    norm2: LayerNorm
    fc1: FrozenLinear
    fc2: FrozenLinear
    scale2: Tensor | None
    heads: int
    attention_scale: float
    approximate: Literal["none", "tanh"]
    fused_attention: bool

    @property
    def linears(self) -> tuple[FrozenLinear, ...]:
        """All Linears, in the order of the adapters."""
        return (*self.inputs, self.output, self.fc1, self.fc2)


class BlockAdapters:
    """The adapters of a block's Linears.

    Attributes:
        columns: one for each of `PreNormBlock.linears`, in their order; None for a Linear without.
        shared: by the input that they read (that of the attention, of its output, of fc1 and of fc2), the adapters that
            are computed together.
        size: columns of a slot.
        complete: whether every column of a slot gets a gradient.
    """

    def __init__(
        self, block: PreNormBlock, columns: Sequence[AdapterColumns | None], size: int, *, together: bool = True
    ) -> None:
        """`together` must be off with dropout, as each adapter then reads its own input."""
        if len(columns) != len(block.linears):
            raise ValueError(f"columns: found {len(columns)}, expected {len(block.linears)} as the block has Linears")
        self.columns, self.size = tuple(columns), size
        pairs = list(zip(block.linears, columns, strict=True))
        count = len(block.inputs)
        reading = (range(count), *([count + read] for read in range(3)))
        self.shared = tuple(share_input(pairs, positions, together=together) for positions in reading)
        trained = sum(shared.trained_columns for of_input in self.shared for shared in of_input)
        self.complete = trained == size
        self._views = FactorViews([shared for of_input in self.shared for shared in of_input], size)

    def factors(self, slots: Tensor) -> list[list[tuple[SharedInput, Factors]]]:
        """`shared`, with their views in `slots` [slots, slot size]."""
        views = iter(self._views.of(slots))
        return [[(shared, next(views)) for shared in of_input] for of_input in self.shared]


def pre_norm_block(
    hidden: Tensor,
    samples: Tensor | None,
    block: PreNormBlock,
    bank: Tensor,
    gradients: Tensor | None,
    adapters: BlockAdapters,
    groups: RowGroups,
    dropout: Sequence[Dropout | None] = (),
) -> Tensor:
    """The hidden states after the block, in which samples that do not go through it are as they were.

    Args:
        hidden: [samples, tokens, features].
        samples: int64, those that go through the block; None for all.
        block: the frozen parts.
        bank: [slots, slot size], the adapters, in the precision of `hidden`.
        gradients: shaped as `bank`, of its dtype or a wider one; backward adds to it. None for no gradients.
        adapters: where the block's adapters lie in a slot.
        groups: the slot of each of the rows (tokens) that go through the block.
        dropout: LoRA dropout, one for each of `block.linears`; empty for none. With it, no `adapters` are together.

    Returns:
        [samples, tokens, features]. autograd differentiates with respect to `hidden` alone; where that needs no
        gradient, a bank that requires gradients makes backward run for the adapters.

    Raises:
        ValueError: a shape, dtype or group table does not fit.
    """
    check_shape("hidden", hidden, (None, None, block.norm1.weight.shape[0]))
    check_float("hidden", hidden)
    check_shape("bank", bank, (None, adapters.size))
    check_like("bank", bank, "hidden", hidden)
    if gradients is not None:
        check_sink("gradients", gradients, bank, "hidden", hidden)
    count = hidden.shape[0] if samples is None else samples.shape[0]
    if groups.rows != count * hidden.shape[1]:
        raise ValueError(f"groups: found {groups.rows} rows in sizes, expected {count * hidden.shape[1]}")
    if groups.smallest_bank > bank.shape[0]:
        raise ValueError(f"groups: found slot {groups.smallest_bank - 1}, expected slots below {bank.shape[0]}")
    if dropout and len(dropout) != len(block.linears):
        raise ValueError(f"dropout: found {len(dropout)}, expected {len(block.linears)} as the block has Linears")
    result: Tensor = _PreNormBlock.apply(hidden, samples, block, bank, gradients, adapters, groups, tuple(dropout))
    return result


def pre_norm_block_reference(
    hidden: Tensor,
    samples: Tensor | None,
    block: PreNormBlock,
    bank: Tensor,
    adapters: BlockAdapters,
    groups: RowGroups,
) -> Tensor:
    """The op in plain torch without dropout, differentiable in hidden and in bank."""
    held = hidden if samples is None else hidden[samples]
    count, tokens, features = held.shape
    *inputs, output, fc1, fc2 = zip(block.linears, adapters.columns, strict=True)

    def adapted(pair: tuple[FrozenLinear, AdapterColumns | None], x: Tensor) -> Tensor:
        linear, adapter = pair
        y = F.linear(x, linear.weight, linear.bias)
        if adapter is None:
            return y
        lora_a = bank[:, adapter.first_a :][:, : adapter.rank * x.shape[1]].unflatten(1, (adapter.rank, -1))
        lora_b = bank[:, adapter.first_b :][:, : adapter.rank * y.shape[1]].unflatten(1, (-1, adapter.rank))
        parts = zip(x.split(groups.sizes), groups.host_slots, strict=True)
        return y + torch.cat([adapter.scale * part @ lora_a[slot].T @ lora_b[slot].T for part, slot in parts])

    def norm(x: Tensor, parts: LayerNorm) -> Tensor:
        return F.layer_norm(x, (features,), parts.weight, parts.bias, parts.eps)

    rows = held.reshape(-1, features)
    x = norm(rows, block.norm1)
    q, k, v = (
        part.reshape(count, tokens, block.heads, -1).transpose(1, 2)
        for part in torch.cat([adapted(pair, x) for pair in inputs], dim=1).chunk(3, dim=1)
    )
    weights = torch.softmax(q @ k.transpose(2, 3) * block.attention_scale, -1)
    attended = adapted(output, (weights @ v).transpose(1, 2).reshape(len(rows), -1))
    rows = rows + (attended if block.scale1 is None else attended * block.scale1)
    wide = F.gelu(adapted(fc1, norm(rows, block.norm2)), approximate=block.approximate)
    out = adapted(fc2, wide)
    rows = rows + (out if block.scale2 is None else out * block.scale2)
    return rows.view(hidden.shape) if samples is None else hidden.index_put((samples,), rows.view(held.shape))


class _PreNormBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        samples: Tensor | None,
        block: PreNormBlock,
        bank: Tensor,
        gradients: Tensor | None,
        adapters: BlockAdapters,
        groups: RowGroups,
        dropout: tuple[Dropout | None, ...],
    ) -> Tensor:
        held = hidden if samples is None else hidden.index_select(0, samples)
        shape = held.shape
        rows = held.reshape(-1, shape[2])
        low_rank = _LowRank(adapters, groups, bank_rows(bank, groups.filled_slots), dropout)

        x1, mean1, inverse1 = _normalize(rows, block.norm1)
        projected = [linear.forward(x1) for linear in block.inputs]
        low_rank.add(0, x1, projected)
        attended, of_attention = attend(
            *_heads(projected, shape, block.heads), block.attention_scale, fused=block.fused_attention
        )
        middle = low_rank.add_to(rows, 1, attended, block.output, block.scale1)
        x2, mean2, inverse2 = _normalize(middle, block.norm2)
        wide = block.fc1.forward(x2)
        low_rank.add(2, x2, [wide])
        y = _activate(wide, block)
        result = low_rank.add_to(middle, 3, y, block.fc2, block.scale2).view(shape)

        needs_hidden = ctx.needs_input_grad[0]
        # Below the first block that has adapters nothing is differentiated.
        of_norm1 = (rows, mean1, inverse1) if needs_hidden else (None, None, None)
        ctx.block, ctx.gradients, ctx.adapters, ctx.groups, ctx.shape = block, gradients, adapters, groups, shape
        ctx.dropout, ctx.attention = dropout, len(of_attention)
        ctx.save_for_backward(
            samples, low_rank.slots, *of_norm1, middle, mean2, inverse2, wide, *of_attention, *low_rank.saved
        )
        return result if samples is None else hidden.index_copy(0, samples, result)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        block: PreNormBlock = ctx.block
        samples, slots, rows, mean1, inverse1, middle, mean2, inverse2, wide, *others = ctx.saved_tensors
        of_attention, of_adapters = others[: ctx.attention], others[ctx.attention :]
        low_rank = _LowRank(ctx.adapters, ctx.groups, slots, ctx.dropout, of_adapters, ctx.gradients)
        held = grad if samples is None else grad.index_select(0, samples)
        # Autograd may give one number in place of many.
        grad_rows = held.reshape(-1, ctx.shape[2]).contiguous()

        grad_out = _scaled(grad_rows, block.scale2)
        grad_y = block.fc2.backward(grad_out)
        low_rank.backward(3, [grad_out], grad_y)
        grad_wide = _activate_backward(grad_y, wide, block)
        grad_x = block.fc1.backward(grad_wide)
        low_rank.backward(2, [grad_wide], grad_x)
        grad_rows = _normalize_backward(grad_x, middle, mean2, inverse2, block.norm2).add_(grad_rows)

        grad_out = _scaled(grad_rows, block.scale1)
        grad_attended = block.output.backward(grad_out)
        low_rank.backward(1, [grad_out], grad_attended)
        of_projected = [grad_rows.new_empty(grad_rows.shape[0], linear.weight.shape[0]) for linear in block.inputs]
        grads = _heads(of_projected, ctx.shape, block.heads)
        attend_backward(grad_attended, of_attention, block.attention_scale, grads)
        needs_hidden = ctx.needs_input_grad[0]
        of_x: Tensor | None = None
        if needs_hidden:
            for linear, part in zip(block.inputs, of_projected, strict=True):
                of_x = linear.backward(part, of_x)
        low_rank.backward(0, of_projected, of_x)
        low_rank.deposit()
        if of_x is None:
            return (None,) * 8
        grad_rows = _normalize_backward(of_x, rows, mean1, inverse1, block.norm1).add_(grad_rows)
        result = grad_rows.view(ctx.shape)
        return (result if samples is None else grad.index_copy(0, samples, result)), *[None] * 7


class _LowRank:
    """The low-rank products of a block in a pass.

    Attributes:
        slots: [groups, slot size], the adapters of each group that has rows, one after another, so that the small
            products of all groups need no copies of their factors.
        saved: what backward needs: of each of `BlockAdapters.shared` the input, what dropout keeps, and A x^T by run.
    """

    def __init__(
        self,
        adapters: BlockAdapters,
        groups: RowGroups,
        slots: Tensor,
        dropout: Sequence[Dropout | None],
        saved: Sequence[Tensor | None] = (),
        gradients: Tensor | None = None,
    ) -> None:
        """For backward, with what was `saved` in forward, and the bank's `gradients` if there are any."""
        self.slots = slots
        self.saved: list[Any] = list(saved)
        self._groups, self._compact, self._dropout = groups, groups.compact, dropout
        self._factors, self._sinks = adapters.factors(slots), None
        self._gradients, self._sink = gradients, None
        if gradients is not None:
            make = torch.empty_like if adapters.complete else torch.zeros_like
            self._sink = make(slots, dtype=gradients.dtype)
            self._sinks = adapters.factors(self._sink)

    def add(self, read: int, x: Tensor, outputs: Sequence[Tensor]) -> None:
        """Add to `outputs`, of the Linears that read input number `read`, which is x. In the order of the inputs."""
        for shared, factors in self._factors[read]:
            drop = self._dropout[shared.position] if self._dropout else None
            keep = None if drop is None else keep_mask(drop, self._groups.sizes, x.shape[1])
            scale = self._scale(shared)
            shrunk = add_low_rank(shared, factors, scale, self._compact, x, outputs[shared.members], keep)
            self.saved += [x if shared.trains_a else None, keep, *shrunk]

    def add_to(self, rows: Tensor, read: int, x: Tensor, linear: FrozenLinear, scale: Tensor | None) -> Tensor:
        """A new tensor: rows + scale · the output of the Linear, with its adapters, for x."""
        y = linear.forward(x, rows if scale is None else None)
        self.add(read, x, [y])
        return y if scale is None else y.mul_(scale).add_(rows)

    def backward(self, read: int, grads: Sequence[Tensor], grad_x: Tensor | None) -> None:
        """Take the gradients of what `add` added to, and add to x's. In the reverse order of the inputs."""
        length = 2 + len(self._compact.runs)
        for number, (shared, factors) in reversed(list(enumerate(self._factors[read]))):
            x, keep, *shrunk = self.saved[-length:]
            del self.saved[-length:]
            sinks = None if self._sinks is None else self._sinks[read][number][1]
            low_rank_backward(
                shared, factors, self._scale(shared), sinks, self._compact,
                x, shrunk, grads[shared.members], grad_x, keep,
            )  # fmt: skip

    def _scale(self, shared: SharedInput) -> float:
        """With what dropout multiplies kept entries by: exactly, which a mask in 16 bits would not be."""
        drop = self._dropout[shared.position] if self._dropout else None
        return shared.scale if drop is None else shared.scale / (1.0 - drop.p)

    def deposit(self) -> None:
        """Add the gradients to those of the bank."""
        if self._gradients is not None and self._sink is not None:
            add_to_bank(self._gradients, self._groups.filled_slots, self._sink)


def _normalize(rows: Tensor, norm: LayerNorm) -> tuple[Tensor, Tensor, Tensor]:
    """The normalized rows, and what backward needs: means and inverse deviations."""
    return torch.native_layer_norm(rows, rows.shape[1:], norm.weight, norm.bias, norm.eps)


def _normalize_backward(grad: Tensor, rows: Tensor, mean: Tensor, inverse: Tensor, norm: LayerNorm) -> Tensor:
    found: Tensor = torch.ops.aten.native_layer_norm_backward(
        grad, rows, rows.shape[1:], mean, inverse, norm.weight, norm.bias, [True, False, False]
    )[0]
    return found


def _activate(wide: Tensor, block: PreNormBlock) -> Tensor:
    return F.gelu(wide, approximate=block.approximate)


def _activate_backward(grad: Tensor, wide: Tensor, block: PreNormBlock) -> Tensor:
    found: Tensor = torch.ops.aten.gelu_backward(grad, wide, approximate=block.approximate)
    return found


def _scaled(grad: Tensor, scale: Tensor | None) -> Tensor:
    return grad if scale is None else grad * scale


def _heads(projected: Sequence[Tensor], shape: torch.Size, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views [samples, tokens, heads, head size] of query, key and value in the outputs of `PreNormBlock.inputs`."""
    views = [
        part.view(shape[0], shape[1], -1, heads, part.shape[1] * len(projected) // (3 * heads)) for part in projected
    ]
    q, k, v = (view for part in views for view in part.unbind(2))
    return q, k, v
