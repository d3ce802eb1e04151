"""Fused pre-norm blocks, which need fewer passes over memory.

Instead of gathering the holders' samples, running the block on the copy and scattering the result, the norms read the
holders' rows from the residual stream, and attention and MLP add to these rows in place. The kernel that produces a
Linear's input (norm or activation) also multiplies it by the adapters' A.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedra_engine.execution.block_parts import Norm, PreNormParts
from fedra_engine.execution.sweep_block import GroupedLoraLinear, SweepBlock, SweepContext
from fedra_engine.models.batch_arguments import BatchArguments
from fedra_kernels import gather_norm, gelu, scatter_add, swiglu


class FusedBlock(SweepBlock):
    """A fused `SweepBlock`; overwrites its hidden states in place."""

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
        rows = self._context.current.plan.blocks[self.position]
        if rows is None or self._checkpoints():
            return super().forward(*args, **kwargs)
        hidden = self.arguments.hidden_states(args, kwargs)
        index = rows.token_index(*hidden.shape[:2])
        stream = self._add_to(hidden, index, rows.index, args, kwargs)
        return self.arguments.output(self._copy_exit_states(self._stand_in(stream) if self._is_replaced else stream))

    def _compute(self, *args: Any, **kwargs: Any) -> Any:
        # Checkpointed blocks run again in backward, from the hidden states they were given.
        hidden = self.arguments.hidden_states(args, kwargs).clone()
        index = torch.arange(hidden.shape[0] * hidden.shape[1], device=hidden.device)
        return self.arguments.output(self._add_to(hidden, index, None, args, kwargs))

    def _add_to(self, hidden: Tensor, index: Tensor, samples: Tensor | None, args: Any, kwargs: Any) -> Tensor:
        """Add attention and MLP to the rows of `hidden` in place, and return it.

        Args:
            hidden: [samples, tokens, features], the residual stream.
            index: int64 [rows], its rows that go through the block.
            samples: int64, the samples of these rows; None for all.
            args, kwargs: the block's arguments.
        """
        parts = self._parts
        tokens, features = hidden.shape[1:]
        held = (-1, tokens, features)
        # Writing to a view makes autograd copy the whole gradient. Only the first block may get a view.
        stream = hidden.clone() if hidden._is_view() else hidden.contiguous()

        x = self._normalize(stream, index, parts.norm1, parts.attention_inputs).view(held)
        # The attention takes the block's arguments for these samples, with x in place of the hidden states.
        held_args, held_kwargs = self.arguments.select(args, kwargs, samples, x)
        attended = parts.attention(*held_args, **held_kwargs)
        if isinstance(attended, tuple):
            attended = attended[0]
        stream = scatter_add(stream, attended.reshape(-1, features), index, parts.scale1)

        x = self._normalize(stream, index, parts.norm2, parts.mlp_inputs).view(held)
        return scatter_add(stream, self._mlp(x).reshape(-1, features), index, parts.scale2)

    def _normalize(self, stream: Tensor, index: Tensor, norm: Norm, readers: Sequence[nn.Module]) -> Tensor:
        """Norm of the rows `index`, [rows, features]; fills `Pass.shrunk` for adapted Linears of `readers`.

        The kernel takes adapters of one rank, the commonest; a Linear of another rank multiplies by its A itself.
        """
        current, block = self._context.current, self.position
        adapted = [reader.target for reader in readers if isinstance(reader, GroupedLoraLinear)]
        ranks = [current.adapters.lora_a[target].shape[1] for target in adapted]
        commonest = max(ranks, key=ranks.count, default=0)
        targets = [target for target, rank in zip(adapted, ranks, strict=True) if rank == commonest]
        drops = [current.dropout[block, target] for target in targets if current.dropout]
        x, shrunk = gather_norm(
            stream,
            index,
            norm.weight,
            norm.bias,
            kind=norm.kind,
            eps=norm.eps,
            lora_a=[current.adapters.lora_a[target] for target in targets],
            groups=current.groups(block, len(index)) if targets else None,
            dropout=drops,
        )
        current.shrunk.update({(block, target): s for target, s in zip(targets, shrunk, strict=True)})
        return x

    def _mlp(self, x: Tensor) -> Tensor:
        current, block, parts = self._context.current, self.position, self._parts
        wide = [layer(x) for layer in parts.mlp_inputs]
        output = parts.mlp_output
        adapter: dict[str, Any] = {}
        if isinstance(output, GroupedLoraLinear):
            adapter = {
                "lora_a": current.adapters.lora_a[output.target],
                "groups": current.groups(block, wide[0].numel() // wide[0].shape[-1]),
                "dropout": current.dropout.get((block, output.target)),
            }
        if parts.activation == "swiglu":
            y, shrunk = swiglu(wide[0], wide[1], **adapter)
        else:
            y, shrunk = gelu(wide[0], approximate="none" if parts.activation == "gelu" else "tanh", **adapter)
        if isinstance(output, GroupedLoraLinear) and shrunk is not None:
            current.shrunk[block, output.target] = shrunk
        result: Tensor = output(y)
        return result
