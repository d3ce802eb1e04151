"""The foundation model, rebuilt so that one pass serves many clients: the layer sweep.

The model's own forward drives the pass. Each block is wrapped: only the samples of clients that hold it go
through, all others skip it. Inside a block each adapter target applies every sample's own client's factors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fedra_engine.errors import InputError
from fedra_engine.execution.dropout import DropoutKeys
from fedra_engine.execution.fused_block import FusedBlock
from fedra_engine.execution.fused_families import match_parts
from fedra_engine.execution.plan import SweepPlan, make_plan
from fedra_engine.execution.sweep_block import SweepBlock
from fedra_engine.execution.sweep_context import GroupedLoraLinear, SweepContext
from fedra_engine.models.adapters import Factor
from fedra_engine.models.batch_arguments import probe_batch_arguments
from fedra_engine.models.foundation import Foundation, replace_module, share_parameters

Inputs = Mapping[str, Tensor]


class SweepModel:
    """A copy of a foundation's module tree, sharing its weights, that computes features for many clients at once.

    Blocks of known families are fused; each fused block has first given the output of the block it stands for.

    Attributes:
        fused: how many blocks are.
    """

    def __init__(
        self, foundation: Foundation, example_inputs: Callable[[int], Inputs], *, fuse_blocks: bool = True
    ) -> None:
        """`example_inputs(n)` gives the model's inputs for n samples; used once, to probe the blocks."""
        self._foundation = foundation
        self._model = share_parameters(foundation.model)
        self._context = SweepContext(foundation.adapter_layout)
        blocks = self._model.get_submodule(foundation.block_path)
        assert isinstance(blocks, nn.ModuleList | nn.Sequential)
        arguments = probe_batch_arguments(self._model, blocks, example_inputs)
        # What the model now returns as logits are the head's inputs; heads are per client.
        replace_module(self._model, foundation.head_path, nn.Identity())
        _check_head(foundation, self._model, example_inputs(2))
        plain = [SweepBlock(block, self._context, i, arguments[i]) for i, block in enumerate(blocks)]
        for position, block in enumerate(blocks):
            for index, target in enumerate(foundation.adapter_layout.targets):
                linear = block.get_submodule(target.path)
                replace_module(block, target.path, GroupedLoraLinear(linear, self._context, position, index))
            blocks[position] = plain[position]
        self.fused = self._fuse(blocks, plain, example_inputs(2)) if fuse_blocks else 0

    def bind(self, adapters: Tensor, gradients: Tensor, factors: Factor = "both") -> None:
        """Use `adapters` [bank rows, slot size] from now on; backward adds gradients of `factors` into `gradients`."""
        self._context.bind(adapters, gradients, factors)

    def features(self, inputs: Inputs, plan: SweepPlan, dropout: DropoutKeys | None = None) -> Tensor:
        """Inputs of the head for the samples of `plan`: [samples, features], of a language model [samples, tokens,
        features]."""
        self._context.plan = plan
        self._context.dropout = dropout
        features = self._model(**inputs).logits
        assert isinstance(features, Tensor)
        return features

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
        self._trial_pass(inputs)
        for hook in hooks:
            hook.remove()
        for position, fused in candidates.items():
            if agrees[position]:
                blocks[position] = fused
        return sum(agrees.values())

    @torch.no_grad()
    def _trial_pass(self, inputs: Inputs) -> None:
        """Run `inputs` as the samples of one client that holds all blocks, with adapters that do something."""
        foundation, depth = self._foundation, self._foundation.depth
        example = next(iter(inputs.values()))
        generator = torch.Generator().manual_seed(0)
        shape = (depth, foundation.adapter_layout.size)
        adapters = torch.randn(shape, generator=generator).mul_(0.05).to(example.device, foundation.dtype)
        self.bind(adapters, torch.empty_like(adapters))
        slots = np.arange(depth)[None]
        heads = np.zeros(1, dtype=np.int64)
        dtype = foundation.adapter_dtype
        plan = make_plan([len(example)], slots, heads, scale=1.0, dtype=dtype, device=example.device)
        self.features(inputs, plan)


@torch.no_grad()
def _check_head(foundation: Foundation, headless: nn.Module, inputs: Inputs) -> None:
    """See to it that the model's logits are what its head makes of what `headless` returns."""
    if foundation.task == "causal_lm":
        # A few tokens will do: logits are large.
        inputs = {name: tensor[:, :8] for name, tensor in inputs.items()}
    logits = foundation.model(**inputs).logits
    found = foundation.head(headless(**inputs).logits)
    tolerance = 3e-2 if logits.dtype in (torch.bfloat16, torch.float16) else 1e-4
    if found.shape != logits.shape or (found - logits).abs().max() > tolerance * logits.abs().max():
        raise InputError(
            f"model.path: found a {type(foundation.model).__name__} that does not return what its "
            f"{foundation.head_path} gives as logits, expected a Linear to make them"
        )


def _compare(fused: FusedBlock, agrees: dict[int, bool], position: int) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        # A fused block adds to its input in place.
        args, kwargs = tree_map_only(Tensor, torch.clone, (args, kwargs))
        expected = output[0] if isinstance(output, tuple) else output
        found = fused(*args, **kwargs)
        found = found[0] if isinstance(found, tuple) else found
        # Enough to tell another computation from rounding.
        tolerance = 3e-2 if expected.dtype in (torch.bfloat16, torch.float16) else 1e-4
        agrees[position] = bool((found - expected).abs().max() <= tolerance * expected.abs().max())

    return hook
