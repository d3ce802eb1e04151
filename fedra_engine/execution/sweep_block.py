"""A block through which only the samples of its holders go, whatever the block is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from fedra_engine.execution.sweep_context import SweepContext
from fedra_engine.models.batch_arguments import BatchArguments


class SweepBlock(nn.Module):
    """Gathers the holders' samples, runs the block, and scatters them back; all others skip it.

    A block of a sharded model is run by all processes, or none could gather its weights. Where nobody holds it, it runs
    on one sample, without adapters, and what comes out is thrown away.
    """

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
        hidden = self._enter(arguments.hidden_states(args, kwargs))
        if rows is None:
            return arguments.output(self._run_on_dummy(hidden, args, kwargs) if self._context.sharded else hidden)
        if rows.index is None:
            return self._run(*arguments.select(args, kwargs, None, hidden))
        held = arguments.select(args, kwargs, rows.index, hidden.index_select(0, rows.index))
        trained = arguments.returned_states(self._run(*held))
        # index_copy would keep the block's output for backward.
        return arguments.output(self._serve_exits(hidden.index_put((rows.index,), trained)))

    def _enter(self, hidden: Tensor) -> Tensor:
        """Have gradients reach the input of the first block on all processes, or some would leave it before others."""
        enters = self._context.sharded and self._position == 0 and torch.is_grad_enabled()
        return hidden.detach().requires_grad_() if enters else hidden

    def _run_on_dummy(self, hidden: Tensor, args: Any, kwargs: Any) -> Tensor:
        """Run the block on the first sample, forward and backward, and throw the result away; returns `hidden`."""
        first = torch.zeros(1, dtype=torch.int64, device=hidden.device)
        sample = hidden[:1].detach().requires_grad_(torch.is_grad_enabled())
        output = self._run(*self.arguments.select(args, kwargs, first, sample))
        kept: Tensor = _Discard.apply(hidden, self.arguments.returned_states(output))
        return kept

    def _run(self, args: Any, kwargs: Any) -> Any:
        """The block's output. Where blocks are checkpointed, its arguments are all that is kept for backward."""
        if not self._checkpoints():
            return self._compute(*args, **kwargs)
        # Nothing is drawn in a block: its own dropout is off, and the adapters' masks are hashes. To stop as soon as
        # all is there would leave modules in the middle, with weights that were gathered for them.
        with set_checkpoint_early_stop(not self._context.sharded):
            return checkpoint(self._again, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    def _again(self, *args: Any, **kwargs: Any) -> Any:
        """As `_compute`, but where weights are sharded backward begins by running the block again.

        Else the first module that needs something would have it run again, and lose the weights it has gathered.
        """
        output = self._compute(*args, **kwargs)
        if not self._context.sharded:
            return output
        return self.arguments.output(_RunAgain.apply(self.arguments.returned_states(output)))

    def _checkpoints(self) -> bool:
        return self._context.checkpoint_blocks and torch.is_grad_enabled()

    def _compute(self, *args: Any, **kwargs: Any) -> Any:
        """What the block returns for the samples that it is given."""
        return self.block(*args, **kwargs)

    def _serve_exits(self, hidden: Tensor) -> Tensor:
        """Give samples that stand for others at an exit after this block the states of those."""
        exits = self._context.plan.exits.get(self._position)
        return hidden if exits is None else exits.take_over(hidden)


class _RunAgain(torch.autograd.Function):
    """The tensor it is given. Backward asks for something that was kept."""

    @staticmethod
    def forward(ctx: Any, output: Tensor) -> Tensor:
        ctx.save_for_backward(output.new_empty(0))
        return output.view_as(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        assert ctx.saved_tensors
        return gradient


class _Discard(torch.autograd.Function):
    """The first of two tensors. Backward passes the second, too, with a gradient of zero."""

    @staticmethod
    def forward(ctx: Any, kept: Tensor, discarded: Tensor) -> Tensor:
        ctx.shape, ctx.dtype = discarded.shape, discarded.dtype
        return kept.view_as(kept)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient.new_zeros(ctx.shape, dtype=ctx.dtype)
