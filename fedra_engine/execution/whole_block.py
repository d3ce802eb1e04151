"""Pre-norm blocks with plain attention, computed as a whole: on a CPU, where every small operation costs."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fedra_engine.execution.block_parts import PreNormParts
from fedra_engine.execution.sweep_block import GroupedLoraLinear, Pass, SweepBlock, SweepContext
from fedra_engine.models.adapters import AdapterLayout, Factor
from fedra_engine.models.batch_arguments import BatchArguments
from fedra_engine.models.structure import stores_input_first
from fedra_kernels import (
    AdapterColumns,
    BlockAdapters,
    Dropout,
    FrozenLinear,
    PreNormBlock,
    RowGroups,
    pre_norm_block,
)


class WholeBlock(SweepBlock):
    """A `SweepBlock` computed by one op, which is checked to give the block's output before it is used.

    A pass in which the block gets tensors beside its hidden states, such as a mask, goes through the block's modules.
    """

    def __init__(
        self,
        block: nn.Module,
        parts: PreNormBlock,
        linears: tuple[nn.Module, ...],
        context: SweepContext,
        position: int,
        arguments: BatchArguments,
    ) -> None:
        """`linears` are the modules of `parts.linears`, of which some have adapters."""
        super().__init__(block, context, position, arguments)
        self._parts = parts
        self._targets = [linear.target if isinstance(linear, GroupedLoraLinear) else None for linear in linears]
        self._latest: tuple[tuple[AdapterLayout, Factor, bool], BlockAdapters] | None = None

    def takes(self, args: Any, kwargs: Any) -> bool:
        """Whether the arguments hold no tensors beside the hidden states."""
        return _hidden_alone(args, kwargs) is not None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        current = self._context.current
        rows = current.plan.blocks[self.position]
        hidden = _hidden_alone(args, kwargs)
        if rows is None or hidden is None or self._checkpoints():
            return super().forward(*args, **kwargs)
        stream = self._run_op(
            current, hidden, rows.index, rows.groups.per_token(hidden.shape[1]), rows.first_token_groups
        )
        return self.arguments.output(self._copy_exit_states(self._stand_in(stream) if self._is_replaced else stream))

    def _compute(self, *args: Any, **kwargs: Any) -> Any:
        hidden = _hidden_alone(args, kwargs)
        if hidden is None:
            return super()._compute(*args, **kwargs)
        current = self._context.current
        groups = current.groups(self.position, hidden.shape[0] * hidden.shape[1])
        return self.arguments.output(self._run_op(current, hidden, None, groups))

    def _run_op(
        self, current: Pass, hidden: Tensor, samples: Tensor | None, groups: RowGroups, first_token_groups: int = 0
    ) -> Tensor:
        factors = current.adapters
        bank, gradients = factors.bank, factors.gradients
        if all(target is None for target in self._targets):
            # Below the first block with adapters nothing is differentiated.
            bank, gradients = bank.detach(), None
        adapters = self._adapters(factors.layout, factors.factors, bool(current.dropout))
        dropout: list[Dropout | None] = []
        if current.dropout:
            dropout = [None if target is None else current.dropout[self.position, target] for target in self._targets]
        return pre_norm_block(
            hidden,
            samples,
            self._parts,
            bank,
            gradients,
            adapters,
            groups,
            dropout,
            first_token_groups=first_token_groups,
        )

    def _adapters(self, layout: AdapterLayout, factors: Factor, dropped: bool) -> BlockAdapters:
        key = (layout, factors, dropped)
        if self._latest is None or self._latest[0] != key:
            columns = [None if target is None else _columns(layout, target, factors) for target in self._targets]
            self._latest = key, BlockAdapters(self._parts, columns, layout.size, together=not dropped)
        return self._latest[1]


def _columns(layout: AdapterLayout, target: int, factors: Factor) -> AdapterColumns:
    of_target = layout.targets[target]
    trains = (factors != "B", factors != "A")
    return AdapterColumns(*layout.first_columns(target), of_target.rank, of_target.scale, *trains)


def match_whole_block(
    plain: SweepBlock, parts: PreNormParts, context: SweepContext, *, fused_attention: bool
) -> WholeBlock | None:
    """A candidate in place of a `plain` block, or None where its `parts` are not those of the op.

    Args:
        fused_attention: see `fedra_kernels.PreNormBlock`.
    """
    attention, output = parts.attention, parts.attention_output
    heads = getattr(attention, "num_attention_heads", getattr(attention, "num_heads", None))
    scale = getattr(attention, "scaling", getattr(attention, "scale", None))
    attention_linears = (*parts.attention_inputs, *([] if output is None else [output]))
    known = {id(parameter) for linear in attention_linears for parameter in linear.parameters()}
    if any(id(parameter) not in known for parameter in attention.parameters()):
        # Norms of queries and keys, or a bias by position.
        return None
    if output is None or not isinstance(heads, int) or not isinstance(scale, float):
        return None
    if not (parts.norm1.kind == parts.norm2.kind == "layer") or getattr(attention, "is_causal", False):
        return None
    if parts.activation == "swiglu" or len(parts.attention_inputs) not in (1, 3):
        return None
    linears = (*parts.attention_inputs, output, *parts.mlp_inputs, parts.mlp_output)
    frozen = [_frozen(linear) for linear in linears]
    of_op = PreNormBlock(
        norm1=parts.norm1,
        inputs=tuple(frozen[:-3]),
        output=frozen[-3],
        scale1=parts.scale1,
        norm2=parts.norm2,
        fc1=frozen[-2],
        fc2=frozen[-1],
        scale2=parts.scale2,
        heads=heads,
        attention_scale=scale,
        approximate="none" if parts.activation == "gelu" else "tanh",
        fused_attention=fused_attention,
    )
    return WholeBlock(plain.block, of_op, linears, context, plain.position, plain.arguments)


def _frozen(linear: Any) -> FrozenLinear:
    input_first = linear.input_first if isinstance(linear, GroupedLoraLinear) else stores_input_first(linear)
    return FrozenLinear(linear.weight, linear.bias, input_first=input_first)


def _hidden_alone(args: Any, kwargs: Any) -> Tensor | None:
    """The hidden states, if a block's arguments hold no other tensors, and do not ask for a causal mask."""
    if kwargs.get("is_causal"):
        return None
    values = (*args, *kwargs.values())
    tensors = [value for value in values if isinstance(value, Tensor)]
    nested = any(isinstance(value, list | tuple | dict) for value in values)
    return tensors[0] if len(tensors) == 1 and not nested else None
