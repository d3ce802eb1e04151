"""The foundation model, rebuilt so that one pass serves many clients: the layer sweep.

The model's own forward drives the pass. Each block is wrapped: only the samples of clients that hold it go
through, all others skip it. Inside a block each adapter target applies every sample's own client's factors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from fedra_engine.execution.dropout import DropoutKeys
from fedra_engine.execution.plan import SweepPlan
from fedra_engine.models.adapters import AdapterLayout
from fedra_engine.models.batch_arguments import BatchArguments, probe_batch_arguments
from fedra_engine.models.foundation import Foundation, replace_module, share_parameters
from fedra_kernels import gather_rows, lora_linear, scatter_rows


class SweepModel:
    """A copy of a foundation's module tree, sharing its weights, that computes features for many clients at once."""

    def __init__(self, foundation: Foundation, example_inputs: Callable[[int], Mapping[str, Tensor]]) -> None:
        """`example_inputs(n)` gives the model's inputs for n samples; used once, to probe the blocks."""
        self._model = share_parameters(foundation.model)
        self._context = _Context(foundation.adapters)
        blocks = self._model.get_submodule(foundation.block_path)
        assert isinstance(blocks, nn.ModuleList | nn.Sequential)
        arguments = probe_batch_arguments(self._model, blocks, example_inputs)
        for position, block in enumerate(blocks):
            for index, target in enumerate(foundation.adapters.targets):
                linear = block.get_submodule(target.path)
                assert isinstance(linear, nn.Linear)
                replace_module(block, target.path, _GroupedLoraLinear(linear, self._context, position, index))
            blocks[position] = _SweepBlock(block, self._context, position, arguments[position])
        # What the model now returns as logits are the classifier's inputs; heads are per client.
        replace_module(self._model, foundation.head_path, nn.Identity())

    def bind(self, adapters: Tensor, gradients: Tensor) -> None:
        """Use `adapters` [bank rows, slot size] from now on; backward adds their gradients into `gradients`."""
        self._context.bind(adapters, gradients)

    def features(self, inputs: Mapping[str, Tensor], plan: SweepPlan, dropout: DropoutKeys | None = None) -> Tensor:
        """Inputs of the classifier for the samples of `plan`, [samples, features]."""
        self._context.plan = plan
        self._context.dropout = dropout
        features = self._model(**inputs).logits
        assert isinstance(features, Tensor)
        return features


class _Context:
    """What the wrapped modules look up during a pass."""

    plan: SweepPlan
    dropout: DropoutKeys | None

    def __init__(self, layout: AdapterLayout) -> None:
        self._layout = layout

    def bind(self, adapters: Tensor, gradients: Tensor) -> None:
        targets = range(len(self._layout.targets))
        # The factors are leaves of autograd only so that it calls the op's backward; that adds into the sinks.
        self.lora_a = [self._layout.lora_a(adapters, t).detach().requires_grad_() for t in targets]
        self.lora_b = [self._layout.lora_b(adapters, t) for t in targets]
        self.grad_a = [self._layout.lora_a(gradients, t) for t in targets]
        self.grad_b = [self._layout.lora_b(gradients, t) for t in targets]


class _GroupedLoraLinear(nn.Module):
    """A frozen Linear plus, for each client's rows, that client's adapter."""

    def __init__(self, linear: nn.Linear, context: _Context, block: int, target: int) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self._context = context
        self._block = block
        self._target = target

    def forward(self, x: Tensor) -> Tensor:
        context = self._context
        rows = context.plan.blocks[self._block]
        assert rows is not None, "a block nobody holds is skipped"
        tokens = x.numel() // (x.shape[-1] * rows.samples)
        return lora_linear(
            x,
            self.weight,
            self.bias,
            context.lora_a[self._target],
            context.lora_b[self._target],
            rows.groups.per_token(tokens),
            context.grad_a[self._target],
            context.grad_b[self._target],
            dropout=None if context.dropout is None else context.dropout.at(self._block, self._target, rows.lanes),
        )


class _SweepBlock(nn.Module):
    """A block through which only the samples of its holders go."""

    def __init__(self, block: nn.Module, context: _Context, position: int, arguments: BatchArguments) -> None:
        super().__init__()
        self.block = block
        self._context = context
        self._position = position
        self._arguments = arguments

    def __getattr__(self, name: str) -> Any:
        # Models read attributes of their blocks (an attention type, say) in their own forward.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        arguments = self._arguments
        rows = self._context.plan.blocks[self._position]
        if rows is None:
            return arguments.output(arguments.hidden_states(args, kwargs))
        if rows.index is None:
            return self.block(*args, **kwargs)
        hidden = arguments.hidden_states(args, kwargs)
        some_args, some_kwargs = arguments.select(args, kwargs, rows.index, gather_rows(hidden, rows.index))
        output = self.block(*some_args, **some_kwargs)
        trained = output[0] if arguments.returns_tuple else output
        return arguments.output(scatter_rows(hidden, trained, rows.index))
