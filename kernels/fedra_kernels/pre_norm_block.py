"""A whole pre-norm transformer block with LoRA for many clients as one autograd function, on a CPU.

Autograd then sees one node a block, and no copy is made but those that the products need: the frozen products add the
residual stream themselves, and the gradients of all adapters of a block reach their bank in one addition.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ._kernels.attention import attend, attend_backward
from ._kernels.checks import check_float, check_like, check_shape, check_sink
from ._kernels.computed_rows import ComputedRows
from ._kernels.low_rank_pass import LowRankPass
from ._kernels.norm import Norm
from ._kernels.shared_input import AdapterColumns, Factors, FactorViews, SharedInput, share_input
from .dropout import Dropout
from .frozen_linear import FrozenLinear
from .groups import RowGroups, bank_rows


@dataclass(frozen=True)
class PreNormBlock:
    """The frozen parts of a block: x += scale1 · attention(norm1(x)); x += scale2 · fc2(GELU(fc1(norm2(x)))).

    Attributes:
        norm1, norm2, fc1, fc2: as in this formula.
        inputs: the Linears of query, key and value; or one for all three, whose outputs lie one after another.
        output: the attention's last Linear.
        scale1, scale2: LayerScale [features], or None for 1.
        heads: number of attention heads.
        attention_scale: what the products of queries and keys are multiplied by.
        approximate: of GELU, as in torch.
        fused_attention: use torch's fused kernel instead of batched products; the results differ by rounding.
    """

    norm1: Norm
    inputs: tuple[FrozenLinear, ...]
    output: FrozenLinear
    scale1: Tensor | None
    norm2: Norm
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
    *,
    first_token_groups: int = 0,
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
        first_token_groups: for so many of the last groups, only the first token of a sample is read afterwards; the
            others stay as they were.

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
    if not 0 <= first_token_groups <= len(groups):
        raise ValueError(
            f"first_token_groups: found {first_token_groups}, expected 0 to {len(groups)} as there are groups"
        )
    if dropout and len(dropout) != len(block.linears):
        raise ValueError(f"dropout: found {len(dropout)}, expected {len(block.linears)} as the block has Linears")
    if any(dropout) and any(len(shared.adapters) > 1 for of_input in adapters.shared for shared in of_input):
        raise ValueError("dropout: found adapters that are computed together, expected BlockAdapters(together=False)")
    result: Tensor = _PreNormBlock.apply(
        hidden, samples, block, bank, gradients, adapters, groups, tuple(dropout), first_token_groups
    )
    return result


def pre_norm_block_reference(
    hidden: Tensor,
    samples: Tensor | None,
    block: PreNormBlock,
    bank: Tensor,
    adapters: BlockAdapters,
    groups: RowGroups,
    first_token_groups: int = 0,
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

    def norm(x: Tensor, parts: Norm) -> Tensor:
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
    result = (rows + (out if block.scale2 is None else out * block.scale2)).view(held.shape)
    on = ComputedRows.of(groups.sizes, tokens, first_token_groups).full_samples
    result = torch.cat([result[:on], torch.cat([result[on:, :1], held[on:, 1:]], dim=1)])
    return result if samples is None else hidden.index_put((samples,), result)


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
        first_token_groups: int,
    ) -> Tensor:
        held = hidden if samples is None else hidden.index_select(0, samples)
        shape = held.shape
        rows, computed = held.reshape(-1, shape[2]), ComputedRows.of(groups.sizes, shape[1], first_token_groups)
        low_rank = LowRankPass(adapters, groups, computed, bank_rows(bank, groups.filled_slots), dropout)

        x1, mean1, inverse1 = _normalize(rows, block.norm1)
        projected = [linear.forward(x1) for linear in block.inputs]
        low_rank.add(0, x1, projected)
        q, k, v = _heads(projected, shape, block.heads)
        attended, of_attention = attend(q, k, v, block.attention_scale, computed, fused=block.fused_attention)
        middle = low_rank.add_to(computed.select(rows), 1, attended, block.output, block.scale1)
        x2, mean2, inverse2 = _normalize(middle, block.norm2)
        wide = block.fc1.forward(x2)
        low_rank.add(2, x2, [wide])
        y = _activate(wide, block)
        result = low_rank.add_to(middle, 3, y, block.fc2, block.scale2)

        needs_hidden = ctx.needs_input_grad[0]
        # The stream below the first block that has adapters needs no gradient.
        of_norm1 = (rows, mean1, inverse1) if needs_hidden else (None, None, None)
        ctx.block, ctx.gradients, ctx.adapters, ctx.groups, ctx.shape = block, gradients, adapters, groups, shape
        ctx.dropout, ctx.attention, ctx.computed = dropout, [len(part) for part in of_attention], computed
        ctx.save_for_backward(
            samples, low_rank.slots, *of_norm1, middle, mean2, inverse2, wide, *chain(*of_attention), *low_rank.saved
        )
        return computed.put(hidden, samples, result)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        block: PreNormBlock = ctx.block
        computed: ComputedRows = ctx.computed
        samples, slots, rows, mean1, inverse1, middle, mean2, inverse2, wide, *others = ctx.saved_tensors
        saved = iter(others)
        of_attention = [list(islice(saved, length)) for length in ctx.attention]
        low_rank = LowRankPass(ctx.adapters, ctx.groups, computed, slots, ctx.dropout, list(saved), ctx.gradients)
        held = grad if samples is None else grad.index_select(0, samples)
        # Autograd may give one number in place of many.
        grad_rows = computed.select(held.reshape(-1, ctx.shape[2]).contiguous())

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
        count = computed.samples * computed.tokens
        of_projected = [grad_rows.new_empty(count, linear.weight.shape[0]) for linear in block.inputs]
        grads = _heads(of_projected, ctx.shape, block.heads)
        attend_backward(grad_attended, of_attention, block.attention_scale, computed, grads)
        of_x: Tensor | None = None
        if ctx.needs_input_grad[0]:
            for linear, part in zip(block.inputs, of_projected, strict=True):
                of_x = linear.backward(part, of_x)
        low_rank.backward(0, of_projected, of_x)
        low_rank.deposit()
        if of_x is None:
            return (None,) * 9
        result = _normalize_backward(of_x, rows, mean1, inverse1, block.norm1).view(ctx.shape)
        computed.add_residual(result, held, grad_rows)
        return (result if samples is None else grad.index_copy(0, samples, result)), *[None] * 8


def _normalize(rows: Tensor, norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
    """The normalized rows, and what backward needs: means and inverse deviations."""
    return torch.native_layer_norm(rows, rows.shape[1:], norm.weight, norm.bias, norm.eps)


def _normalize_backward(grad: Tensor, rows: Tensor, mean: Tensor, inverse: Tensor, norm: Norm) -> Tensor:
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
