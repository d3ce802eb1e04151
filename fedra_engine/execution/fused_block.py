"""Fused pre-norm blocks: one op adds attention and MLP in place to the rows of the residual stream that hold the block.

What lies between the attention's first and last products (heads, rotary embeddings, masks) stays the model's own code.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence, Set
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fedra_engine.execution.block_parts import PreNormParts
from fedra_engine.execution.sweep_block import GroupedLoraLinear, Pass, SweepBlock, SweepContext
from fedra_engine.models.adapters import AdapterLayout
from fedra_engine.models.batch_arguments import BatchArguments
from fedra_engine.models.structure import stores_input_first
from fedra_kernels import AdaptedLayer, AdapterColumns, RowGroups, StreamBlock, stream_block


class FusedBlock(SweepBlock):
    """A fused `SweepBlock`; overwrites its hidden states in place."""

    def __init__(
        self,
        block: nn.Module,
        parts: StreamBlock,
        linears: Sequence[nn.Module],
        core: AttentionCore,
        context: SweepContext,
        position: int,
        arguments: BatchArguments,
    ) -> None:
        """`linears` are the modules of the layers of `parts`, in their order."""
        super().__init__(block, context, position, arguments)
        self._parts, self._core = parts, core
        self._linears = linears
        self._targets = [linear.target if isinstance(linear, GroupedLoraLinear) else None for linear in linears]
        self._unread: Tensor | None = None
        """In place of the hidden states in the attention's arguments, of which it must read the shape alone."""

    def settle(self) -> None:
        """Make the weights of Linears that read one input views of their one matrix, so that none is kept twice."""
        first = 0
        for layer in self._parts.layers:
            linears: Sequence[Any] = self._linears[first : first + len(layer.widths)]
            first += len(linears)
            if len(linears) > 1:
                for linear, (weight, _) in zip(linears, layer.parts(), strict=True):
                    linear.weight.data = weight

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        current = self._context.current
        rows = current.plan.blocks[self.position]
        if rows is None:
            return super().forward(*args, **kwargs)
        hidden = self.arguments.hidden_states(args, kwargs)
        tokens, features = hidden.shape[1:]
        samples = hidden.shape[0] if rows.index is None else len(rows.index)
        if self._unread is None or (self._unread.dtype, self._unread.device) != (hidden.dtype, hidden.device):
            self._unread = hidden.new_full((), torch.nan)
        held = self.arguments.select(args, kwargs, rows.index, self._unread.expand(samples, tokens, features))
        # Writing to a view makes autograd copy the whole gradient. Only the first block may get a view.
        stream = hidden.clone() if hidden._is_view() else hidden.contiguous()
        index = None if rows.index is None else rows.token_index(hidden.shape[0], tokens)
        stream = self._run_op(current, stream, index, rows.groups.per_token(tokens), held)
        return self.arguments.output(self._copy_exit_states(self._stand_in(stream) if self._is_replaced else stream))

    def _run_op(
        self, current: Pass, stream: Tensor, index: Tensor | None, groups: RowGroups, held: tuple[Any, Any]
    ) -> Tensor:
        factors = current.adapters
        bank, gradients = factors.bank, factors.gradients
        if all(target is None for target in self._targets):
            # Below the first block with adapters nothing is differentiated.
            bank, gradients = bank.detach(), None
        dropout = []
        if current.dropout:
            dropout = [None if target is None else current.dropout[self.position, target] for target in self._targets]
        args, kwargs = held
        return stream_block(
            stream,
            index,
            self._parts,
            partial(self._core, args=args, kwargs=kwargs),
            bank,
            gradients,
            groups,
            dropout,
            trains_a=factors.factors != "B",
            trains_b=factors.factors != "A",
            recompute=self._checkpoints(),
            hand_over=current.hand_over,
        )


class AttentionCore:
    """An attention without its Linears: from the outputs of its first ones to the input of its last one."""

    def __init__(self, attention: nn.Module, inputs: Sequence[nn.Module], output: nn.Module) -> None:
        """`inputs` and `output` are its first and its last Linears."""
        self._given = [_Given() for _ in inputs]
        paths = {id(module): path for path, module in attention.named_modules()}
        places = {paths[id(module)]: given for module, given in zip(inputs, self._given, strict=True)}
        self._attention = _with_modules(attention, {**places, paths[id(output)]: nn.Identity()})

    def __call__(self, projected: Sequence[Tensor], args: Any, kwargs: Any) -> Tensor:
        """The input [rows, in] of the last Linear, for `projected` [rows, out] of each of the first.

        Args:
            args, kwargs: what the attention takes, with hidden states of the right shape, which are not read.
        """
        hidden = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        for given, value in zip(self._given, projected, strict=True):
            given.value = value.unflatten(0, hidden.shape[:-1])
        try:
            attended = self._attention(*args, **kwargs)
        finally:
            # An attention that fails must not keep them.
            for given in self._given:
                given.value = None
        result: Tensor = attended[0] if isinstance(attended, tuple) else attended
        return result.reshape(-1, result.shape[-1])


class _Given(nn.Module):
    """Returns a value that is given beforehand."""

    value: Tensor | None = None

    def forward(self, _: Tensor) -> Tensor:
        assert self.value is not None
        return self.value


def match_fused_block(
    plain: SweepBlock, parts: PreNormParts, context: SweepContext, layout: AdapterLayout, tied: Set[int]
) -> FusedBlock | None:
    """A candidate in place of a `plain` block, or None where its `parts` are not those of the op.

    Args:
        tied: ids of parameters that the model's blocks use more than once, which cannot lie in one matrix with others.
    """
    output = parts.attention_output
    if output is None:
        return None
    read = (parts.attention_inputs, (output,), parts.mlp_inputs, (parts.mlp_output,))
    linears = [linear for of_input in read for linear in of_input]
    known = {id(linear) for linear in linears}
    adapted = [module for module in plain.block.modules() if isinstance(module, GroupedLoraLinear)]
    if any(id(module) not in known for module in adapted):
        return None
    layers, first = [], 0
    for of_input in read:
        layer = _layer(of_input, layout, first, tied)
        if layer is None:
            return None
        layers.append(layer)
        first += len(of_input)
    try:
        block = StreamBlock(
            norm1=parts.norm1,
            attention_inputs=layers[0],
            attention_output=layers[1],
            scale1=parts.scale1,
            norm2=parts.norm2,
            mlp_inputs=layers[2],
            activation=parts.activation,
            mlp_output=layers[3],
            scale2=parts.scale2,
        )
    except ValueError:
        return None
    core = AttentionCore(parts.attention, parts.attention_inputs, output)
    return FusedBlock(plain.block, block, linears, core, context, plain.position, plain.arguments)


def _layer(linears: Sequence[Any], layout: AdapterLayout, first: int, tied: Set[int]) -> AdaptedLayer | None:
    """The Linears as one layer; None where their weights or their adapters cannot be put together."""
    orders = {_stores_input_first(linear) for linear in linears}
    adapters = [_columns(linear, layout) for linear in linears]
    if len(orders) > 1:
        return None
    (input_first,) = orders
    if input_first and len(linears) > 1:
        return None
    weights = [linear.weight for linear in linears]
    alike = len({(weight.dtype, weight.device) for weight in weights}) == 1
    if len(linears) > 1 and not (alike and tied.isdisjoint(id(weight) for weight in weights)):
        return None
    widths = tuple(linear.weight.shape[1 if input_first else 0] for linear in linears)
    weight, biases = _stacked(weights), [linear.bias for linear in linears]
    bias = None
    if any(part is not None for part in biases):
        zeros = (weight.new_zeros(width) for width in widths)
        bias = torch.cat([zero if part is None else part.detach() for part, zero in zip(biases, zeros, strict=True)])
    try:
        return AdaptedLayer(weight, bias, widths, tuple(adapters), first, input_first)
    except ValueError:
        return None


def _stores_input_first(linear: Any) -> bool:
    return linear.input_first if isinstance(linear, GroupedLoraLinear) else stores_input_first(linear)


def _columns(linear: nn.Module, layout: AdapterLayout) -> AdapterColumns | None:
    if not isinstance(linear, GroupedLoraLinear):
        return None
    target = layout.targets[linear.target]
    return AdapterColumns(*layout.first_columns(linear.target), target.rank, target.scale)


def _stacked(weights: Sequence[nn.Parameter]) -> Tensor:
    """The weights [out, in] one below the other, in one matrix: that of which they are views, or a new one."""
    first = weights[0].detach()
    if len(weights) == 1:
        return first
    rows, end = sum(len(weight) for weight in weights), first.storage_offset()
    storage = first.untyped_storage()
    together = True
    for weight in weights:
        same = weight.untyped_storage()._cdata == storage._cdata and weight.storage_offset() == end
        together &= same and weight.is_contiguous()
        end += weight.numel()
    if together:
        return first.as_strided((rows, first.shape[1]), (first.shape[1], 1))
    return torch.cat([weight.detach() for weight in weights])


def _with_modules(root: nn.Module, replaced: Mapping[str, nn.Module]) -> nn.Module:
    """A copy of the modules on the way to those that are replaced; the others, and all parameters, are shared."""
    result = copy.copy(root)
    result._modules = dict(root._modules)
    below: dict[str, dict[str, nn.Module]] = {}
    for path, module in replaced.items():
        name, _, rest = path.partition(".")
        if rest:
            below.setdefault(name, {})[rest] = module
        else:
            result._modules[name] = module
    for name, of_child in below.items():
        child = root._modules[name]
        assert child is not None
        result._modules[name] = _with_modules(child, of_child)
    return result
