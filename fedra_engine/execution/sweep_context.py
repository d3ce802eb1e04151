"""What the modules of a sweep look up during a pass."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from fedra_engine.execution.dropout import DropoutKeys
from fedra_engine.execution.plan import BlockRows, SweepPlan
from fedra_engine.models.adapters import AdapterLayout, Factor
from fedra_engine.models.linears import linear_shape, stores_input_first
from fedra_kernels import Dropout, RowGroups, lora_linear, to_device


class PassDropout:
    """The dropout of every target in every block of a pass, on the device."""

    def __init__(self, keys: DropoutKeys, plan: SweepPlan, targets: int, device: torch.device) -> None:
        """Copy all keys at once; their clients are in the order of the plan's batch, and blocks have `targets` each."""
        held = {block: rows.clients for block, rows in enumerate(plan.blocks) if rows is not None}
        everywhere = keys.at(np.array(list(held), dtype=np.int64)[:, None], np.arange(targets))
        tables = [of_block[:, clients] for of_block, clients in zip(everywhere, held.values(), strict=True)]
        self._p = keys.p
        self._tables = dict(zip(held, to_device(tables, device), strict=True))

    def at(self, block: int, target: int) -> Dropout:
        """The dropout of one target of one block, for the clients that go through the block."""
        return Dropout(self._p, self._tables[block][target])


class SweepContext:
    """The plan, the adapter bank and its gradient sinks of the pass that is going on."""

    plan: SweepPlan
    dropout: PassDropout | None

    def __init__(self, layout: AdapterLayout, *, sharded: bool = False, checkpoint_blocks: bool = False) -> None:
        """With `sharded` weights every pass runs all blocks; with `checkpoint_blocks` backward runs blocks again."""
        self._layout = layout
        self.sharded = sharded
        self.checkpoint_blocks = checkpoint_blocks
        self.shrunk: dict[tuple[int, int], Tensor] = {}
        """drop(x) Aᵀ of the targets whose input's producer computed it, until the target takes it."""

    def bind(self, adapters: Tensor, gradients: Tensor, factors: Factor = "both") -> None:
        """Use `adapters` [bank rows, slot size] from now on; backward adds gradients of `factors` into `gradients`."""
        targets = range(len(self._layout.targets))
        # The factors are leaves of autograd only so that it calls the op's backward; that adds into the sinks.
        self.lora_a = [self._layout.lora_a(adapters, t).detach().requires_grad_() for t in targets]
        self.lora_b = [self._layout.lora_b(adapters, t) for t in targets]
        self.grad_a = [self._layout.lora_a(gradients, t) if factors != "B" else None for t in targets]
        self.grad_b = [self._layout.lora_b(gradients, t) if factors != "A" else None for t in targets]

    def rows(self, block: int) -> BlockRows:
        """Who goes through `block`; it is one that somebody holds."""
        rows = self.plan.blocks[block]
        assert rows is not None
        return rows

    def groups(self, block: int, x: Tensor) -> RowGroups:
        """The slots of the rows of x [samples, …, features] in `block`."""
        rows = self.rows(block)
        return rows.groups.per_token(x.numel() // (x.shape[-1] * rows.samples))

    def dropout_at(self, block: int, target: int) -> Dropout | None:
        """The LoRA dropout of one target of one block."""
        return None if self.dropout is None else self.dropout.at(block, target)


class GroupedLoraLinear(nn.Module):
    """A frozen Linear plus, for each client's rows, that client's adapter."""

    def __init__(self, linear: nn.Module, context: SweepContext, block: int, target: int) -> None:
        super().__init__()
        weight, bias = linear.weight, linear.bias
        assert isinstance(weight, nn.Parameter)
        assert bias is None or isinstance(bias, nn.Parameter)
        self.weight = weight
        self.bias = bias
        self.in_features, self.out_features = linear_shape(linear)
        self.target = target
        self._context = context
        self._block = block
        self._input_first = stores_input_first(linear)

    def forward(self, x: Tensor) -> Tensor:
        context, block, target = self._context, self._block, self.target
        if context.plan.blocks[block] is None:
            return self._frozen(x)
        return lora_linear(
            x,
            self.weight,
            self.bias,
            context.lora_a[target],
            context.lora_b[target],
            context.groups(block, x),
            context.grad_a[target],
            context.grad_b[target],
            dropout=context.dropout_at(block, target),
            shrunk=context.shrunk.pop((block, target), None),
            input_first=self._input_first,
        )

    def _frozen(self, x: Tensor) -> Tensor:
        """What the Linear gives without an adapter."""
        if not self._input_first:
            return nn.functional.linear(x, self.weight, self.bias)
        y = x @ self.weight
        return y if self.bias is None else y + self.bias
