"""The modules of a sweep, adapted Linears and the blocks around them, and the pass that they read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from fedra_engine.execution.plan import SweepPlan
from fedra_engine.models.adapters import AdapterLayout, Factor
from fedra_engine.models.batch_arguments import BatchArguments
from fedra_engine.models.quantization import has_quantized_weight
from fedra_engine.models.stand_ins import LowRankMap
from fedra_engine.models.structure import linear_shape, stores_input_first
from fedra_kernels import Dropout, GradientHandOver, RowGroups, lora_linear, low_rank_add


class BankFactors:
    """An adapter bank, views of each target's factors in it, and of the gradients that backward adds to."""

    def __init__(
        self, layout: AdapterLayout, adapters: Tensor, gradients: Tensor | None = None, factors: Factor = "both"
    ) -> None:
        """`adapters` and `gradients` are [bank rows, slot size]; only `factors` get gradients."""
        self.layout, self.gradients, self.factors = layout, gradients, factors
        # As A below.
        self.bank = adapters.detach().requires_grad_()
        targets = range(len(layout.targets))
        sinks = {factor: gradients if factors in ("both", factor) else None for factor in ("A", "B")}
        # A requires gradients only so that autograd calls the op's backward, which itself adds to the sinks.
        self.lora_a = [layout.lora_a(adapters, t).detach().requires_grad_() for t in targets]
        self.lora_b = [layout.lora_b(adapters, t) for t in targets]
        self.grad_a = [None if (sink := sinks["A"]) is None else layout.lora_a(sink, t) for t in targets]
        self.grad_b = [None if (sink := sinks["B"]) is None else layout.lora_b(sink, t) for t in targets]


@dataclass(frozen=True)
class Pass:
    """The state of a pass, from its forward to the end of its backward.

    Attributes:
        plan: which samples go through which block.
        adapters: the bank's factors.
        dropout: LoRA dropout by (block, target); empty if nothing is dropped.
        stand_ins: the map of each block; empty if no block is replaced.
        hand_over: by which fused blocks pass on the gradient of the residual stream.
    """

    plan: SweepPlan
    adapters: BankFactors
    dropout: Mapping[tuple[int, int], Dropout] = field(default_factory=dict)
    stand_ins: Sequence[LowRankMap] = ()
    hand_over: GradientHandOver = field(default_factory=GradientHandOver)

    def groups(self, block: int, rows: int) -> RowGroups:
        """The samples in `block`, which must have a holder, by client; they are `rows` rows (tokens) together."""
        of_block = self.plan.blocks[block]
        assert of_block is not None
        return of_block.groups.per_token(rows // of_block.groups.rows)


@dataclass
class SweepContext:
    """State that the modules of a sweep share.

    Attributes:
        sharded: whether weights are sharded, so that every pass must run all blocks.
        checkpoint_blocks: whether backward runs blocks again instead of saving their activations.
        running: the current pass, if any.
    """

    sharded: bool = False
    checkpoint_blocks: bool = False
    running: Pass | None = None

    @property
    def current(self) -> Pass:
        """The current pass; there must be one."""
        assert self.running is not None
        return self.running


class GroupedLoraLinear(nn.Module):
    """A frozen Linear plus, for each client's rows, that client's adapter.

    Where the weight is no plain parameter, the Linear computes its product by itself.
    """

    def __init__(self, linear: nn.Module, context: SweepContext, block: int, target: int, scale: float) -> None:
        super().__init__()
        self._linear = linear if has_quantized_weight(linear) else None
        weight, bias = (linear.weight, linear.bias) if self._linear is None else (None, None)
        assert weight is None or isinstance(weight, nn.Parameter)
        assert bias is None or isinstance(bias, nn.Parameter)
        self.weight = weight
        self.bias = bias
        self.in_features, self.out_features = linear_shape(linear)
        self.target = target
        self._scale = scale
        self._context = context
        self._block = block
        self.input_first = stores_input_first(linear)

    def forward(self, x: Tensor) -> Tensor:
        current, block, target = self._context.current, self._block, self.target
        if current.plan.blocks[block] is None:
            # A dummy run, whose output is not used; see `SweepBlock`.
            assert self.weight is not None
            return nn.functional.linear(x, self.weight.T if self.input_first else self.weight, self.bias)
        y = lora_linear(
            x,
            self.weight,
            self.bias,
            current.adapters.lora_a[target],
            current.adapters.lora_b[target],
            current.groups(block, x.numel() // self.in_features),
            self._scale,
            current.adapters.grad_a[target],
            current.adapters.grad_b[target],
            dropout=current.dropout.get((block, target)),
            input_first=self.input_first,
        )
        return y if self._linear is None else self._linear(x) + y


class SweepBlock(nn.Module):
    """Gathers the holders' samples, runs the block, and scatters them back.

    Other samples skip it, or pass through its stand-in.

    With sharded weights, all processes must run every block. A process whose clients do not hold it runs it on one
    sample, without adapters, and ignores the output.
    """

    def __init__(self, block: nn.Module, context: SweepContext, position: int, arguments: BatchArguments) -> None:
        super().__init__()
        self.block = block
        self._context = context
        self.position = position
        self.arguments = arguments

    def __getattr__(self, name: str) -> Any:
        # Models read attributes of their blocks (an attention type, say) in forward.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)

    def takes(self, args: Any, kwargs: Any) -> bool:
        """Whether it computes the block itself for these arguments."""
        return True

    def settle(self) -> None:
        """Called once when it has taken the place of another block in the model."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        arguments = self.arguments
        rows = self._context.current.plan.blocks[self.position]
        hidden = arguments.hidden_states(args, kwargs)
        if self._context.sharded and self.position == 0 and torch.is_grad_enabled():
            # So that backward runs all of the first block on all processes.
            hidden = hidden.detach().requires_grad_()
        if rows is None:
            kept = self._run_on_dummy(hidden, args, kwargs) if self._context.sharded else hidden
            # The block before may have kept it for backward.
            return arguments.output(self._stand_in(kept.clone()) if self._is_replaced else kept)
        if rows.index is None:
            return self._run(*arguments.select(args, kwargs, None, hidden))
        held = arguments.select(args, kwargs, rows.index, hidden.index_select(0, rows.index))
        trained = arguments.returned_states(self._run(*held))
        # index_copy would save the block's output for backward.
        combined = hidden.index_put((rows.index,), trained)
        return arguments.output(self._copy_exit_states(self._stand_in(combined) if self._is_replaced else combined))

    def _run_on_dummy(self, hidden: Tensor, args: Any, kwargs: Any) -> Tensor:
        """Run the block on the first sample, forward and backward, and ignore the result; returns `hidden`."""
        first = torch.zeros(1, dtype=torch.int64, device=hidden.device)
        sample = hidden[:1].detach().requires_grad_(torch.is_grad_enabled())
        output = self._run(*self.arguments.select(args, kwargs, first, sample))
        kept: Tensor = _Discard.apply(hidden, self.arguments.returned_states(output))
        return kept

    def _run(self, args: Any, kwargs: Any) -> Any:
        """Run the block, checkpointed if blocks are."""
        if not self._checkpoints():
            return self._compute(*args, **kwargs)
        # Blocks draw nothing: their own dropout is off, and the adapters' masks are hashes. An early stop would leave
        # the weights of a sharded block gathered.
        with set_checkpoint_early_stop(not self._context.sharded):
            return checkpoint(self._again, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    def _again(self, *args: Any, **kwargs: Any) -> Any:
        """As `_compute`; if weights are sharded, backward begins by running the block again.

        Otherwise the first module that needs a kept tensor would have it run again, and lose the weights it has
        gathered.
        """
        output = self._compute(*args, **kwargs)
        if not self._context.sharded:
            return output
        return self.arguments.output(_RunAgain.apply(self.arguments.returned_states(output)))

    def _checkpoints(self) -> bool:
        return self._context.checkpoint_blocks and torch.is_grad_enabled()

    def _compute(self, *args: Any, **kwargs: Any) -> Any:
        return self.block(*args, **kwargs)

    @property
    def _is_replaced(self) -> bool:
        return self.position in self._context.current.plan.replaced

    def _stand_in(self, stream: Tensor) -> Tensor:
        """Apply the stand-in in place to the samples of `stream` [samples, ..., features] that lack the block."""
        current = self._context.current
        rows = current.plan.replaced[self.position]
        index = rows.token_index(len(stream), stream[0].numel() // stream.shape[-1])
        return low_rank_add(stream.contiguous(), index, *current.stand_ins[self.position])

    def _copy_exit_states(self, hidden: Tensor) -> Tensor:
        """Copy the hidden states of samples that exit after this block to their copies in the batch."""
        rows = self._context.current.plan.exits.get(self.position)
        return hidden if rows is None else hidden.index_copy(0, rows[0], hidden.index_select(0, rows[1]))


class _RunAgain(torch.autograd.Function):
    """Returns its input. Backward reads a kept tensor, which makes the checkpoint run the block again."""

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
    """Returns the first of two tensors. Backward goes through the second, too, with a gradient of zero."""

    @staticmethod
    def forward(ctx: Any, kept: Tensor, discarded: Tensor) -> Tensor:
        ctx.shape, ctx.dtype = discarded.shape, discarded.dtype
        return kept.view_as(kept)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient.new_zeros(ctx.shape, dtype=ctx.dtype)
