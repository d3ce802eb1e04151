"""The foundation model, rebuilt so that one pass serves many clients: the layer sweep.

The model's own forward drives the pass. Each block is wrapped: only the samples of clients that hold it go
through, all others skip it. Inside a block each adapter target applies every sample's own client's factors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fedra_engine.execution.dropout import DropoutKeys
from fedra_engine.execution.fused_block import FusedBlock
from fedra_engine.execution.fused_families import match_parts
from fedra_engine.execution.plan import HostPlan, SweepPlan, single_client_plan
from fedra_engine.execution.rehearsal import Inputs, check_sweep, same
from fedra_engine.execution.sweep_block import SweepBlock
from fedra_engine.execution.sweep_context import GroupedLoraLinear, PassDropout, SweepContext
from fedra_engine.models.adapters import Factor
from fedra_engine.models.batch_arguments import probe_batch_arguments
from fedra_engine.models.foundation import Foundation, replace_module, share_parameters
from fedra_engine.models.sharded_parameters import gathered
from fedra_engine.models.sharding import Sharding


class SweepModel:
    """A copy of a foundation's module tree, sharing its weights, that computes features for many clients at once.

    Blocks of known families are fused; each fused block has first given the output of the block it stands for.

    Attributes:
        fused: how many blocks are.
    """

    def __init__(
        self,
        foundation: Foundation,
        example_inputs: Callable[[int], Inputs],
        *,
        fuse_blocks: bool = True,
        checkpoint_blocks: bool = False,
        sharding: Sharding | None = None,
    ) -> None:
        """Rebuild the model of `foundation`.

        Args:
            foundation: the model.
            example_inputs: gives the model's inputs for a number of samples; used once, to probe the blocks.
            fuse_blocks: fuse those that can be.
            checkpoint_blocks: keep only the inputs of blocks for backward, which runs them again.
            sharding: how the weights of `foundation` are sharded, if they are; then blocks cannot be fused, and all
                processes must build this together and make equally many passes.
        """
        # cuDNN's attention builds a plan for every number of samples, and each block has its own.
        torch.backends.cuda.enable_cudnn_sdp(False)
        self._foundation = foundation
        self._sharding = sharding
        self._model = share_parameters(foundation.model)
        self._context = SweepContext(
            foundation.adapter_layout, sharded=sharding is not None, checkpoint_blocks=checkpoint_blocks
        )
        blocks = self._model.get_submodule(foundation.block_path)
        assert isinstance(blocks, nn.ModuleList | nn.Sequential)
        if sharding is not None:
            sharding.attach(foundation.model)
        arguments = probe_batch_arguments(foundation.model, foundation.blocks, example_inputs)
        # What the model now returns as logits are the head's inputs; heads are per client.
        replace_module(self._model, foundation.head_path, nn.Identity())
        plain = [SweepBlock(block, self._context, i, arguments[i]) for i, block in enumerate(blocks)]
        for position, block in enumerate(blocks):
            for index, target in enumerate(foundation.adapter_layout.targets):
                linear = block.get_submodule(target.path)
                replace_module(block, target.path, GroupedLoraLinear(linear, self._context, position, index))
            blocks[position] = plain[position]
        if sharding is not None:
            sharding.attach(self._model)
        # A cut model would have to be attached to its shards, too.
        check_sweep(foundation, self._trial_pass, example_inputs(2), cuts=sharding is None)
        self.fused = self._fuse(blocks, plain, example_inputs(2)) if fuse_blocks else 0

    def bind(self, adapters: Tensor, gradients: Tensor, factors: Factor = "both") -> None:
        """Use `adapters` [bank rows, slot size] from now on; backward adds gradients of `factors` into `gradients`."""
        self._context.bind(adapters, gradients, factors)

    def features(self, inputs: Inputs, plan: SweepPlan, dropout: DropoutKeys | None = None) -> Tensor:
        """Inputs of the head for the samples of `plan`: [samples, features], of a language model [samples, tokens,
        features]."""
        self._context.plan = plan
        targets, device = len(self._foundation.adapter_layout.targets), plan.heads.device
        self._context.dropout = None if dropout is None else PassDropout(dropout, plan, targets, device)
        features = self._model(**inputs).logits
        assert isinstance(features, Tensor)
        return features

    def backward(self, loss: Tensor) -> None:
        """Go back through the pass that gave the features which `loss` was made of."""
        loss.backward()
        if self._sharding is not None:
            self._sharding.release()

    def abandon_pass(self) -> None:
        """Let go of what a pass that broke off has left for modules which it did not reach."""
        self._context.shrunk.clear()

    def dummy_pass(self, inputs: Inputs) -> None:
        """Pass through a sharded model, forward and backward, without clients, because other processes have some.

        `inputs` are those of one sample.
        """
        example = next(iter(inputs.values()))
        nothing = np.full(self._foundation.depth, -1, dtype=np.int64)
        plan = single_client_plan(1, nothing, dtype=self._foundation.adapter_dtype, device=example.device)
        features = self.features(inputs, plan)
        if self._foundation.task == "causal_lm":
            # The others gather the output layer for their losses.
            with gathered(self._foundation.head):
                pass
        self.backward(features.sum() * 0)

    def _fuse(self, blocks: nn.ModuleList | nn.Sequential, plain: list[SweepBlock], inputs: Inputs) -> int:
        """Put a fused block wherever it gives the output of the plain one; returns how many it put."""
        candidates = {
            position: FusedBlock(block.block, parts, self._context, position, block.arguments)
            for position, block in enumerate(plain)
            if (parts := match_parts(block.block)) is not None
        }
        agrees: dict[int, bool] = {}
        hooks = [
            plain[position].register_forward_hook(_compare(fused, agrees, position), with_kwargs=True)
            for position, fused in candidates.items()
        ]
        generator = torch.Generator().manual_seed(0)
        depth, size = self._foundation.depth, self._foundation.adapter_layout.size
        self._trial_pass(inputs, torch.randn(depth, size, generator=generator).mul_(0.05), np.arange(depth)[None])
        self.abandon_pass()
        for hook in hooks:
            hook.remove()
        for position, fused in candidates.items():
            if agrees[position]:
                blocks[position] = fused
        return sum(agrees.values())

    @torch.no_grad()
    def _trial_pass(self, inputs: Inputs, adapters: Tensor, slots: NDArray[np.int64]) -> Tensor:
        """See `TrialPass`."""
        example, groups = next(iter(inputs.values())), len(slots)
        adapters = adapters.to(example.device, self._foundation.dtype)
        self.bind(adapters, torch.empty_like(adapters))
        sizes, heads = [len(example) // groups] * groups, np.arange(groups)
        dtype = self._foundation.adapter_dtype
        plan = HostPlan(sizes, slots, heads, scale=1.0, dtype=dtype, device=example.device)
        return self.features(inputs, plan.on_device())


def _compare(fused: FusedBlock, agrees: dict[int, bool], position: int) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        # A fused block adds to its input in place.
        args, kwargs = tree_map_only(Tensor, torch.clone, (args, kwargs))
        try:
            found = fused(*args, **kwargs)
        except TypeError:  # Another library's block of these names takes its arguments in another order.
            agrees[position] = False
            return
        expected, found = (result[0] if isinstance(result, tuple) else result for result in (output, found))
        agrees[position] = same(found, expected)

    return hook
