"""A pre-norm transformer block with LoRA for many clients, added in place to rows of the residual stream.

One autograd function computes the whole block but for the core of its attention, what lies between the products for
query, key and value and the attention's last product, which the caller provides. Backward computes the outputs of norms
and activation again instead of keeping them, and can add to the gradient of the stream in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ._kernels.adapted_layer import AdaptedLayer
from ._kernels.checks import (
    check_bank,
    check_device,
    check_index,
    check_like,
    check_shape,
    check_sink,
    check_stream,
    stream_rows,
)
from ._kernels.frozen_block import StreamBlock
from ._kernels.norm import Norm
from ._kernels.stream_steps import Activation, NormedRows, Outputs, Shrunk, StreamRows, StreamSteps
from ._kernels.stream_torch import TorchSteps
from ._kernels.stream_triton import TritonSteps
from .dispatch import use_triton
from .dropout import Dropout
from .groups import RowGroups
from .lora_linear import lora_linear_reference

Attend = Callable[[Sequence[Tensor]], Tensor]
"""The core of an attention: from the outputs [rows, out] of the Linears that read the norm to the input [rows, in] of
the last Linear; made of differentiable operations."""


class GradientHandOver:
    """Lets a block overwrite the gradient that it is given, instead of a copy; the blocks of a pass share one.

    An autograd function must not overwrite it, as others may hold the tensor. Nobody does if the next block has made it
    and has read this block's output unchanged, without a hook. The outputs of all but the last block must not be inputs
    of `torch.autograd.grad`, which holds their gradients and does not say so.
    """

    def __init__(self) -> None:
        self._output: ref[Tensor] | None = None
        self._version = 0
        self._storage = 0

    def leave(self, stream: Tensor) -> None:
        """Remember the output of a block."""
        if not stream.is_inference():
            self._output, self._version = ref(stream), stream._version

    def followed(self, stream: Tensor) -> ref[Tensor] | None:
        """`stream` if it is the output of the block before, as that block has left it."""
        known = self._output is not None and self._output() is stream and stream._version == self._version
        # A hook may keep the gradient.
        return self._output if known and not stream._backward_hooks else None

    def give(self, grad: Tensor, followed: ref[Tensor] | None) -> None:
        """Remember the gradient that a block returns; `followed`: of its input."""
        stream = None if followed is None else followed()
        # One may have come since.
        owned = followed is not None and not (stream is not None and stream._backward_hooks)
        self._storage = grad.untyped_storage()._cdata if owned else 0

    def take(self, grad: Tensor) -> Tensor:
        """The gradient that a block is given, or a copy if others may hold it."""
        given, self._storage = self._storage, 0
        # autograd may pass another tensor of the same memory.
        return grad if given and grad.untyped_storage()._cdata == given else grad.clone()


def stream_block(
    stream: Tensor,
    index: Tensor | None,
    block: StreamBlock,
    attend: Attend,
    bank: Tensor,
    gradients: Tensor | None,
    groups: RowGroups,
    dropout: Sequence[Dropout | None] = (),
    *,
    trains_a: bool = True,
    trains_b: bool = True,
    recompute: bool = False,
    hand_over: GradientHandOver | None = None,
) -> Tensor:
    """The residual stream after the block; where `index` is given, it is `stream` itself, overwritten.

    Args:
        stream: [samples, ..., features], contiguous; its leading dimensions, flattened, are its rows.
        index: int64 [rows], unique rows of the stream that go through the block, whole samples, one client after
            another. None: all, in order. On a GPU its values are not checked.
        block: the frozen parts.
        attend: the core of the attention, for these rows. Called again in backward with `recompute`.
        bank: [slots, `block.slot_size`], the adapters, in the precision of `stream`.
        gradients: shaped as `bank`, of its dtype or a wider one; backward adds to it. None for no gradients.
        groups: the slot of each of the rows.
        dropout: LoRA dropout of each Linear of `block.layers`; empty for none.
        trains_a, trains_b: whether A and B get gradients.
        recompute: keep only the rows that went in, and compute the rest again in backward.
        hand_over: shared by the blocks of a pass, so that they need no copies of the gradient of the stream.

    Returns:
        the stream. autograd differentiates with respect to `stream` alone; where that needs no gradient, a bank that
        requires gradients makes backward run for the adapters.

    Raises:
        ValueError: a shape, dtype, device, group table or row number does not fit.
    """
    _check(stream, index, block, bank, gradients, groups, dropout)
    kind = TritonSteps if use_triton(stream) else TorchSteps
    steps = kind(bank, gradients, trains_a, trains_b, groups, tuple(dropout), block.first_b)
    # An evaluation keeps nothing either.
    recompute = recompute or not torch.is_grad_enabled()
    hand_over = hand_over or GradientHandOver()
    followed = hand_over.followed(stream)
    result: Tensor = _StreamBlock.apply(stream, index, block, attend, bank, steps, recompute, hand_over, followed)
    hand_over.leave(result)
    return result


def stream_block_reference(
    stream: Tensor,
    index: Tensor | None,
    block: StreamBlock,
    attend: Attend,
    bank: Tensor,
    groups: RowGroups,
    dropout: Sequence[Dropout | None] = (),
) -> Tensor:
    """The op in plain torch, in a new tensor, differentiable in stream and bank."""

    def adapted(x: Tensor, layer: AdaptedLayer) -> list[Tensor]:
        outputs = []
        banks = dict(zip(layer.members, zip(layer.lora_a(bank), layer.lora_b(bank), strict=True), strict=True))
        for member, (weight, bias) in enumerate(layer.parts()):
            if member not in banks:
                outputs.append(F.linear(x, weight, bias))
                continue
            drop = dropout[layer.first + member] if dropout else None
            outputs.append(lora_linear_reference(x, weight, bias, *banks[member], groups, layer.scale, drop))
        return outputs

    def add(rows: Tensor, y: Tensor, scale: Tensor | None) -> Tensor:
        return rows + (y if scale is None else y * scale)

    rows = stream_rows(stream) if index is None else stream_rows(stream)[index]
    x = _norm(rows, block.norm1)
    (attended,) = adapted(attend(adapted(x, block.attention_inputs)), block.attention_output)
    rows = add(rows, attended, block.scale1)
    y = _activation(adapted(_norm(rows, block.norm2), block.mlp_inputs), block.activation)
    (found,) = adapted(y, block.mlp_output)
    rows = add(rows, found, block.scale2)
    result = rows if index is None else stream_rows(stream).index_copy(0, index, rows)
    return result.view(stream.shape)


def _norm(rows: Tensor, norm: Norm) -> Tensor:
    if norm.kind == "layer":
        return F.layer_norm(rows, rows.shape[1:], norm.weight, norm.bias, norm.eps)
    return F.rms_norm(rows, rows.shape[1:], norm.weight, norm.eps)


def _activation(wide: Sequence[Tensor], kind: Activation) -> Tensor:
    if kind == "swiglu":
        gate, up = wide
        return F.silu(gate) * up
    return F.gelu(wide[0], approximate="none" if kind == "gelu" else "tanh")


@dataclass(frozen=True)
class _Kept:
    """What backward needs of a forward pass: the rows that the norms have read, outputs of layers, and S of each layer.

    Attributes:
        projected: the outputs of the attention's first Linears.
        attended: what its core has made of them.
        core: the ends of the core's graph: what it was given, and its result.
    """

    first: NormedRows
    shrunk_inputs: Shrunk
    projected: Outputs
    attended: Tensor
    core: tuple[list[Tensor], Tensor]
    shrunk_attended: Shrunk
    second: NormedRows
    shrunk_mlp: Shrunk
    wide: Outputs
    shrunk_output: Shrunk

    def pack(self) -> tuple[list[Tensor], list[int]]:
        """All tensors that are not part of the graph, and the lengths of the lists among them."""
        lists = (
            self.projected, self.shrunk_inputs, self.shrunk_attended, self.wide, self.shrunk_mlp, self.shrunk_output,
        )  # fmt: skip
        normed = [part for rows in (self.first, self.second) for part in (rows.rows, rows.mean, rows.inverse)]
        return [*normed, self.attended, *chain(*lists)], [len(tensors) for tensors in lists]

    @classmethod
    def unpack(
        cls, tensors: Sequence[Tensor], lengths: Sequence[int], block: StreamBlock, core: tuple[list[Tensor], Tensor]
    ) -> _Kept:
        """The reverse of `pack`; `core` are the ends of the graph of the attention's core."""
        rows1, mean1, inverse1, rows2, mean2, inverse2, attended, *rest = tensors
        left = iter(rest)
        projected, of_inputs, of_attended, wide, of_mlp, of_output = (list(islice(left, length)) for length in lengths)
        first, second = (
            NormedRows(rows1, mean1, inverse1, block.norm1),
            NormedRows(rows2, mean2, inverse2, block.norm2),
        )
        return cls(first, of_inputs, projected, attended, core, of_attended, second, of_mlp, wide, of_output)


def _forward(
    steps: StreamSteps, source: StreamRows, block: StreamBlock, attend: Attend, *, kept: bool
) -> tuple[_Kept, Tensor]:
    """What backward needs, and the activation; all but the MLP's last product. `kept`: for a backward pass."""
    x, first, shrunk_inputs = steps.normalize(source, block.norm1, block.attention_inputs)
    outputs = steps.product(x, block.attention_inputs, shrunk_inputs)
    with torch.set_grad_enabled(kept):
        leaves = [part.detach().requires_grad_(kept) for part in block.attention_inputs.by_member(outputs)]
        result = attend(leaves)
    # An attention may return a part of something wider; kernels read whole rows.
    attended = result.detach().contiguous()
    middle, shrunk_attended = steps.add_product(attended, block.attention_output, None, source, block.scale1)
    x, second, shrunk_mlp = steps.normalize(StreamRows(middle), block.norm2, block.mlp_inputs)
    wide = steps.product(x, block.mlp_inputs, shrunk_mlp)
    y, shrunk_output = steps.activate(wide, block.activation, block.mlp_output)
    kept_tensors = _Kept(
        first=first,
        shrunk_inputs=shrunk_inputs,
        projected=outputs,
        attended=attended,
        core=(leaves, result),
        shrunk_attended=shrunk_attended,
        second=second,
        shrunk_mlp=shrunk_mlp,
        wide=wide,
        shrunk_output=shrunk_output,
    )
    return kept_tensors, y


class _StreamBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        stream: Tensor,
        index: Tensor | None,
        block: StreamBlock,
        attend: Attend,
        bank: Tensor,
        steps: StreamSteps,
        recompute: bool,
        hand_over: GradientHandOver,
        followed: ref[Tensor] | None,
    ) -> Tensor:
        source = StreamRows(stream_rows(stream), index)
        kept, y = _forward(steps, source, block, attend, kept=not recompute)
        # A view would be copied by the next block, which writes to the stream.
        result = stream.new_empty(stream.shape) if index is None else stream
        middle, out = StreamRows(kept.second.rows), StreamRows(stream_rows(result), index)
        steps.add_product(y, block.mlp_output, kept.shrunk_output, middle, block.scale2, out)
        ctx.steps, ctx.block, ctx.hand_over, ctx.followed = steps, block, hand_over, followed
        tensors, ctx.lengths = ([kept.first.rows], None) if recompute else kept.pack()
        # A graph's own tensors are freed with it.
        ctx.core = attend if recompute else kept.core
        ctx.save_for_backward(index, *tensors)
        if index is not None:
            ctx.mark_dirty(stream)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        steps, block = ctx.steps, ctx.block
        index, *tensors = ctx.saved_tensors
        if ctx.core is None:
            raise RuntimeError("stream_block: found a second backward pass, expected one for each forward pass")
        if ctx.lengths is None:
            kept, _ = _forward(steps, StreamRows(tensors[0]), block, ctx.core, kept=True)
        else:
            kept = _Kept.unpack(tensors, ctx.lengths, block, ctx.core)
        ctx.core = None
        shape, needs_stream = grad.shape, ctx.needs_input_grad[0]
        owned = ctx.hand_over.take(grad.contiguous()) if needs_stream and index is not None else grad.contiguous()
        result = _backward(steps, block, kept, StreamRows(stream_rows(owned), index), needs_stream=needs_stream)
        if result is None:
            return (None,) * 9
        result = result.view(shape)
        ctx.hand_over.give(result, ctx.followed)
        return result, *[None] * 8


def _backward(
    steps: StreamSteps, block: StreamBlock, kept: _Kept, grad: StreamRows, *, needs_stream: bool
) -> Tensor | None:
    """The gradient of the stream before the block, in place of that after it, `grad`, unless the block has all rows."""
    output, mlp, last = block.mlp_output, block.mlp_inputs, block.attention_output
    grad_output, grad_shrunk = steps.output_gradient(
        [grad.matrix], output, kept.shrunk_output, grad.index, block.scale2
    )
    grad_y = steps.input_gradient(grad_output, output, grad_shrunk)
    grad_x = steps.mlp_gradient(
        grad_y, kept.wide, block.activation, output, grad_shrunk, mlp, kept.shrunk_mlp, kept.second
    )
    grad_middle = steps.norm_gradient(grad_x, kept.second, grad)

    grad_output, grad_shrunk = steps.output_gradient([grad_middle], last, kept.shrunk_attended, None, block.scale1)
    grad_attended = steps.input_gradient(grad_output, last, grad_shrunk)
    steps.factor_gradient(kept.attended, last, grad_shrunk)
    given, result_of_core = kept.core
    of_given = torch.autograd.grad(result_of_core, given, grad_attended, allow_unused=True, materialize_grads=True)
    # An attention may expand its gradients, or permute them; kernels read rows.
    grad_projected = [part.contiguous() for part in of_given]
    grad_output, grad_shrunk = steps.output_gradient(grad_projected, block.attention_inputs, kept.shrunk_inputs)
    steps.factor_gradient(kept.first, block.attention_inputs, grad_shrunk)
    result: Tensor | None = None
    if needs_stream:
        grad_x = steps.input_gradient(grad_output, block.attention_inputs, grad_shrunk)
        result = steps.norm_gradient(grad_x, kept.first, StreamRows(grad_middle), None if grad.index is None else grad)
    steps.finish()
    return result


def _check(
    stream: Tensor,
    index: Tensor | None,
    block: StreamBlock,
    bank: Tensor,
    gradients: Tensor | None,
    groups: RowGroups,
    dropout: Sequence[Dropout | None],
) -> None:
    check_stream("stream", stream)
    check_shape("stream", stream, (*stream.shape[:-1], block.norm1.weight.shape[0]))
    check_like("stream", stream, "block", block.norm1.weight)
    rows = stream_rows(stream.detach())
    if index is not None:
        check_index("index", index, "stream", rows)
    count = rows.shape[0] if index is None else index.shape[0]
    if groups.rows != count:
        raise ValueError(f"groups: found {groups.rows} rows in sizes, expected {count}")
    check_shape("bank", bank, (None, None))
    check_like("bank", bank, "stream", stream)
    check_bank("bank", bank)
    # A block without adapters reads no bank.
    if block.slot_size not in (0, bank.shape[1]):
        raise ValueError(f"bank: found {bank.shape[1]} entries of a slot, expected {block.slot_size}")
    if gradients is not None:
        check_sink("gradients", gradients, bank, "stream", stream)
    if groups.smallest_bank > bank.shape[0]:
        raise ValueError(f"groups: found slot {groups.smallest_bank - 1}, expected slots below {bank.shape[0]}")
    check_device("groups", groups, "stream", stream)
    _check_dropout(block, groups, dropout, stream)


def _check_dropout(block: StreamBlock, groups: RowGroups, dropout: Sequence[Dropout | None], stream: Tensor) -> None:
    if not dropout:
        return
    linears = sum(len(layer.widths) for layer in block.layers)
    if len(dropout) != linears:
        raise ValueError(f"dropout: found {len(dropout)}, expected {linears} as the block has Linears")
    drops = [dropout[layer.first + member] for layer in block.layers for member in layer.members]
    rates = [None if drop is None else drop.p for drop in drops]
    if len(set(rates)) > 1 or None in rates:
        raise ValueError(f"dropout: found p {rates}, expected one p for all adapters")
    for drop in drops:
        assert drop is not None
        check_shape("dropout.keys", drop.keys, (len(groups),))
        check_device("dropout.keys", drop.keys, "stream", stream)
