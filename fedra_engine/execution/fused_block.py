"""A pre-norm block in few passes over memory.

Instead of gathering the holders' samples, running the block on the copy and scattering the result, the norms read
the residual stream through the row map, and the two sub-layers add to it in place. The producer of a Linear's input
(norm or activation) also multiplies it by the adapters' A while it has the rows at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedra_engine.execution.fused_families import Norm, PreNormParts
from fedra_engine.execution.sweep_block import SweepBlock
from fedra_engine.execution.sweep_context import GroupedLoraLinear, SweepContext
from fedra_engine.models.batch_arguments import BatchArguments
from fedra_kernels import gather_norm, gelu, scatter_add, swiglu


class FusedBlock(SweepBlock):
    """Computes what `SweepBlock` does, for blocks whose parts are known; overwrites its hidden states in place."""

    def __init__(
        self,
        block: nn.Module,
        parts: PreNormParts,
        context: SweepContext,
        position: int,
        arguments: BatchArguments,
    ) -> None:
        super().__init__(block, context, position, arguments)
        self._parts = parts

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        rows = self._context.plan.blocks[self._position]
        if rows is None or self._checkpoints():
            return super().forward(*args, **kwargs)
        hidden = self.arguments.hidden_states(args, kwargs)
        index = rows.token_index(*hidden.shape[:2])
        return self.arguments.output(self._serve_exits(self._add_to(hidden, index, rows.index, args, kwargs)))

    def _compute(self, *args: Any, **kwargs: Any) -> Any:
        # The given hidden states are needed again in backward, so what is overwritten must be a copy.
        hidden = self.arguments.hidden_states(args, kwargs).clone()
        index = torch.arange(hidden.shape[0] * hidden.shape[1], device=hidden.device)
        return self.arguments.output(self._add_to(hidden, index, None, args, kwargs))

    def _add_to(self, hidden: Tensor, index: Tensor, some: Tensor | None, args: Any, kwargs: Any) -> Tensor:
        """`hidden` [samples, tokens, features], to which the sub-layers have added in place.

        Args:
            hidden: the residual stream.
            index: int64 [rows], those of its rows that go through the block.
            some: int64, the samples these belong to; None for all.
            args, kwargs: of the block.
        """
        parts = self._parts
        tokens, features = hidden.shape[1:]
        held = (-1, tokens, features)
        # Autograd copies the whole gradient where a view is written to; only a model's first block may get one.
        stream = hidden.clone() if hidden._is_view() else hidden.contiguous()

        x = self._normalize(stream, index, parts.norm1, parts.attention_inputs).view(held)
        # The attention takes the block's own arguments, cut to the samples that go through, with x for h.
        some_args, some_kwargs = self.arguments.select(args, kwargs, some, x)
        attended = parts.attention(*some_args, **some_kwargs)
        if isinstance(attended, tuple):
            attended = attended[0]
        stream = scatter_add(stream, attended.reshape(-1, features), index, parts.scale1)

        x = self._normalize(stream, index, parts.norm2, parts.mlp_inputs).view(held)
        return scatter_add(stream, self._mlp(x).reshape(-1, features), index, parts.scale2)

    def _normalize(self, stream: Tensor, index: Tensor, norm: Norm, readers: Sequence[nn.Module]) -> Tensor:
        """norm of the rows `index`, [rows, features]; leaves the shrunk rows for the adapted ones among `readers`."""
        context, block = self._context, self._position
        targets = [reader.target for reader in readers if isinstance(reader, GroupedLoraLinear)]
        drops = [drop for target in targets if (drop := context.dropout_at(block, target)) is not None]
        x, shrunk = gather_norm(
            stream,
            index,
            norm.weight,
            norm.bias,
            kind=norm.kind,
            eps=norm.eps,
            lora_a=[context.lora_a[target] for target in targets],
            groups=context.rows(block).groups.per_token(len(index) // context.rows(block).samples) if targets else None,
            dropout=drops,
        )
        context.shrunk.update({(block, target): s for target, s in zip(targets, shrunk, strict=True)})
        return x

    def _mlp(self, x: Tensor) -> Tensor:
        context, block, parts = self._context, self._position, self._parts
        wide = [layer(x) for layer in parts.mlp_inputs]
        output = parts.mlp_output
        adapter: dict[str, Any] = {}
        if isinstance(output, GroupedLoraLinear):
            adapter = {
                "lora_a": context.lora_a[output.target],
                "groups": context.groups(block, wide[0]),
                "dropout": context.dropout_at(block, output.target),
            }
        if parts.activation == "swiglu":
            y, shrunk = swiglu(wide[0], wide[1], **adapter)
        else:
            y, shrunk = gelu(wide[0], approximate="none" if parts.activation == "gelu" else "tanh", **adapter)
        if isinstance(output, GroupedLoraLinear) and shrunk is not None:
            context.shrunk[block, output.target] = shrunk
        result: Tensor = output(y)
        return result
