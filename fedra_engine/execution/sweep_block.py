"""A block through which only the samples of its holders go, whatever the block is."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fedra_engine.execution.sweep_context import SweepContext
from fedra_engine.models.batch_arguments import BatchArguments
from fedra_kernels import gather_rows, scatter_rows


class SweepBlock(nn.Module):
    """Gathers the holders' samples, runs the block, and scatters them back; all others skip it."""

    def __init__(self, block: nn.Module, context: SweepContext, position: int, arguments: BatchArguments) -> None:
        super().__init__()
        self.block = block
        self._context = context
        self._position = position
        self.arguments = arguments

    def __getattr__(self, name: str) -> Any:
        # Models read attributes of their blocks (an attention type, say) in their own forward.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        arguments = self.arguments
        rows = self._context.plan.blocks[self._position]
        if rows is None:
            return arguments.output(arguments.hidden_states(args, kwargs))
        if rows.index is None:
            return self.block(*args, **kwargs)
        hidden = arguments.hidden_states(args, kwargs)
        some_args, some_kwargs = arguments.select(args, kwargs, rows.index, gather_rows(hidden, rows.index))
        output = self.block(*some_args, **some_kwargs)
        trained = output[0] if arguments.returns_tuple else output
        return arguments.output(self._serve_exits(scatter_rows(hidden, trained, rows.index)))

    def _serve_exits(self, hidden: Tensor) -> Tensor:
        """Give samples that stand for others at an exit after this block the states of those."""
        exits = self._context.plan.exits.get(self._position)
        return hidden if exits is None else exits.take_over(hidden)
