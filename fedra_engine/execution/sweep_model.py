"""The layer sweep: the foundation model with wrapped blocks, so that one pass trains many clients.

The model's own forward drives the pass. Only the samples of clients that hold a block go through it, and inside each
adapter target applies the factors of each sample's client.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fedra_engine.execution.block_parts import match_parts
from fedra_engine.execution.dropout import PassDropout
from fedra_engine.execution.first_token import find_fewest_first_token_samples
from fedra_engine.execution.fused_block import match_fused_block
from fedra_engine.execution.model_check import (
    OF_MODELS,
    ModelInputs,
    check_norm,
    check_sweep,
    nearly_equal,
    nearly_same_change,
)
from fedra_engine.execution.padding_mask import IDS, MASK, MaskUse, find_mask_use
from fedra_engine.execution.plan import ExitCopy, SweepPlan, plan_groups
from fedra_engine.execution.sweep_block import BankFactors, GroupedLoraLinear, Pass, SweepBlock, SweepContext
from fedra_engine.execution.whole_block import match_whole_block
from fedra_engine.models.batch_arguments import probe_batch_arguments
from fedra_engine.models.foundation import Foundation, replace_module, share_parameters
from fedra_engine.models.sharding import Sharding
from fedra_engine.models.stand_ins import LowRankMap
from fedra_kernels.dispatch import nothing_runs, use_triton


class SweepModel:
    """A copy of a foundation's module tree that shares its weights and computes features for many clients at once.

    Attributes:
        arguments: the batch arguments of each block.
        fused: number of fused blocks; each has been checked to give the original block's output.
        fewest_first_token_samples: fewest samples ending in a block for which only their first token is computed there;
            None if other tokens are read after the blocks.
    """

    def __init__(
        self,
        foundation: Foundation,
        example_inputs: Callable[[int], ModelInputs],
        *,
        fuse_blocks: bool = True,
        whole_blocks: bool = True,
        kernel_blocks: bool = True,
        checkpoint_blocks: bool = False,
        sharding: Sharding | None = None,
    ) -> None:
        """Wrap and check the blocks.

        Args:
            example_inputs: gives the model's inputs for a number of samples, to probe the blocks.
            fuse_blocks: fuse the blocks of known families.
            whole_blocks: of these, let one op compute those that it can on a CPU.
            kernel_blocks: of these, let the kernels for a GPU compute the others.
            checkpoint_blocks: save only the blocks' inputs for backward, which runs the blocks again.
            sharding: how the weights are sharded, if they are; then blocks cannot be fused, and all processes must
                build the model together and make equally many passes.
        """
        # cuDNN's attention builds a plan for every batch size, and every block has its own.
        torch.backends.cuda.enable_cudnn_sdp(False)
        self.fused = 0
        self.fewest_first_token_samples: int | None = None
        self._foundation = foundation
        self._sharding = sharding
        self._model = share_parameters(foundation.model)
        self._context = SweepContext(sharded=sharding is not None, checkpoint_blocks=checkpoint_blocks)
        blocks = self.blocks
        if sharding is not None:
            sharding.attach(foundation.model)
        self.arguments = probe_batch_arguments(foundation.model, foundation.blocks, example_inputs)
        self._mask_use = self._find_mask_use(example_inputs(2))
        trial = self._with_mask_as_needed(example_inputs(2))
        # The model then returns the head's inputs as logits; heads are per client.
        replace_module(self._model, foundation.head_path, nn.Identity())
        # The features then lack the norm's scale and shift, which are per client, too: `HeadLayout.scaled`.
        norm = None if foundation.norm_path is None else _without_scale(self._model.get_submodule(foundation.norm_path))
        plain = [SweepBlock(block, self._context, i, self.arguments[i]) for i, block in enumerate(blocks)]
        for position, block in enumerate(blocks):
            for index, target in enumerate(foundation.adapter_layout.targets if foundation.adapted[position] else ()):
                linear, place = block.get_submodule(target.path), (position, index)
                replace_module(block, target.path, GroupedLoraLinear(linear, self._context, *place, target.scale))
            blocks[position] = plain[position]
        if sharding is not None:
            sharding.attach(self._model)
        if norm is not None:
            check_norm(foundation, norm, self.features_of, trial)
        # A sharded model cannot be cut without attaching the cut one to its shards.
        check_sweep(foundation, self.features_of, trial, cuts=sharding is None)
        if fuse_blocks and whole_blocks and not use_triton(foundation.head.weight):
            self.fused += self._fuse(blocks, plain, self._whole(plain), trial)
            if self.fused:
                self.fewest_first_token_samples = find_fewest_first_token_samples(foundation, self, trial)
        if fuse_blocks and kernel_blocks:
            left = [block for block in plain if blocks[block.position] is block]
            self.fused += self._fuse(blocks, plain, self._of_kernels(left), trial)

    @property
    def blocks(self) -> nn.ModuleList | nn.Sequential:
        """The wrapped blocks."""
        blocks: Any = self._model.get_submodule(self._foundation.block_path)
        return blocks

    def features(
        self,
        inputs: ModelInputs,
        plan: SweepPlan,
        adapters: BankFactors,
        dropout: PassDropout | None = None,
        stand_ins: Sequence[LowRankMap] = (),
    ) -> Tensor:
        """Begin a pass, and return the head's inputs.

        They are [samples, features], for a language model [samples, tokens, features]. The pass ends with `backward` or
        `end_pass`; it ends here if it fails or no gradients are wanted.
        """
        self._context.running = Pass(plan, adapters, {} if dropout is None else dropout.of, stand_ins)
        features: Tensor | None = None
        try:
            features = self._model(**self._with_mask_as_needed(inputs)).logits
        finally:
            if features is None or not features.requires_grad:
                self.end_pass()
        assert features is not None
        return features

    def features_of(
        self,
        inputs: ModelInputs,
        adapters: Tensor,
        slots: NDArray[np.int64],
        gradients: Tensor | None = None,
        *,
        copies: Sequence[ExitCopy] = (),
        all_tokens: bool = False,
    ) -> Tensor:
        """As `features`, outside of a round, for `inputs` that are divided evenly among groups.

        Args:
            inputs: the inputs of all groups, one after another.
            adapters: [bank rows, slot size].
            slots: int64 [groups, blocks], bank rows; -1 where a group skips the block.
            gradients: [bank rows, slot size], which `backward` adds to; None for no gradients.
            copies: the groups that are copies of others at early exits.
            all_tokens: compute tokens that nothing reads, too.
        """
        foundation, fewest = self._foundation, None if all_tokens else self.fewest_first_token_samples
        sizes = [len(next(iter(inputs.values()))) // len(slots)] * len(slots)
        plan = plan_groups(foundation, sizes, slots, copies=copies, fewest_first_token_samples=fewest)
        bank = adapters.to(foundation.device, foundation.dtype)
        return self.features(inputs, plan, BankFactors(foundation.adapter_layout, bank, gradients))

    def watch_blocks(self, inputs: ModelInputs, adapters: Tensor, see: Callable[[int, Tensor, Tensor], None]) -> None:
        """Pass through the whole model, and `see` each block's number and hidden states before and after it.

        Args:
            inputs: the inputs of one group.
            adapters: those of the blocks, [blocks, slot size].
            see: gets hidden states [samples, ..., features].
        """
        given: list[Tensor] = []

        def before(block: SweepBlock, args: Any, kwargs: Any) -> None:
            # A fused block overwrites it.
            given.append(block.arguments.hidden_states(args, kwargs).clone())

        def after(block: SweepBlock, args: Any, kwargs: Any, output: Any) -> None:
            see(block.position, given.pop(), block.arguments.returned_states(output))

        hooks = [block.register_forward_pre_hook(before, with_kwargs=True) for block in self.blocks.children()]
        hooks += [block.register_forward_hook(after, with_kwargs=True) for block in self.blocks.children()]
        try:
            self.features_of(inputs, adapters, np.arange(self._foundation.depth)[None], all_tokens=True)
        finally:
            for hook in hooks:
                hook.remove()

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass of `loss`, and end the pass."""
        try:
            loss.backward()
        finally:
            self.end_pass()
        if self._sharding is not None:
            self._sharding.release()

    def end_pass(self) -> None:
        """End the current pass, if there is one, and keep none of its tensors."""
        self._context.running = None

    def dummy_pass(self, inputs: ModelInputs) -> None:
        """Pass through a sharded model without clients, forward and backward, as other processes still have some.

        `inputs` are those of one sample.
        """
        foundation = self._foundation
        nothing = np.full((1, foundation.depth), -1, dtype=np.int64)
        features = self.features_of(inputs, torch.empty(0, foundation.adapter_layout.size), nothing)
        # Other processes may gather the head for their losses.
        with foundation.task.whole_head():
            pass
        self.backward(features.sum() * 0)

    def _find_mask_use(self, inputs: ModelInputs) -> MaskUse:
        """Not tried with a sharded model, of which every pass is collective."""
        return "always" if self._sharding is not None else find_mask_use(self._foundation, self.arguments[0], inputs)

    def _with_mask_as_needed(self, inputs: ModelInputs) -> ModelInputs:
        """The inputs with an attention mask where the model needs one."""
        if self._mask_use == "never":
            return {name: tensor for name, tensor in inputs.items() if name != MASK}
        if self._mask_use == "always" and IDS in inputs and MASK not in inputs:
            return {**inputs, MASK: torch.ones_like(inputs[IDS])}
        return inputs

    def _fuse(
        self,
        blocks: nn.ModuleList | nn.Sequential,
        plain: list[SweepBlock],
        candidates: Mapping[int, SweepBlock],
        inputs: ModelInputs,
    ) -> int:
        """Put a candidate wherever it gives the output of the plain block; returns how many it put.

        None is put if the model then gives other features, as one does that reads a block's output again which the next
        block has overwritten.
        """
        if not candidates:
            return 0
        agrees: dict[int, bool] = {}
        hooks = [
            plain[position].register_forward_hook(_compare(fused, agrees, position), with_kwargs=True)
            for position, fused in candidates.items()
        ]
        depth, size = self._foundation.depth, self._foundation.adapter_layout.size
        adapters = torch.randn(depth, size, generator=torch.Generator().manual_seed(0)).mul_(0.05)
        with torch.no_grad():
            expected = self.features_of(inputs, adapters, np.arange(depth)[None])
        for hook in hooks:
            hook.remove()
        put = [position for position in candidates if agrees[position]]
        for position in put:
            blocks[position] = candidates[position]
        with torch.no_grad():
            found = self.features_of(inputs, adapters, np.arange(depth)[None])
            # Where somebody skips blocks, the others' outputs are overwritten.
            slots = np.arange(depth)[None].repeat(2, axis=0)
            slots[1] = -1
            beside = self.features_of(inputs, adapters, slots)[:1]
        pairs = (found, expected), (beside, expected[:1])
        if not nothing_runs(found.device) and not all(nearly_equal(*pair, many_blocks=True) for pair in pairs):
            for position in put:
                blocks[position] = plain[position]
            return 0
        if not self._trains(inputs, adapters):
            for position in put:
                blocks[position] = plain[position]
            return 0
        for position in put:
            candidates[position].settle()
        return len(put)

    def _trains(self, inputs: ModelInputs, adapters: Tensor) -> bool:
        """Whether a backward pass runs, too; that of a model which writes over what its Linears return may not."""
        foundation = self._foundation
        if nothing_runs(foundation.device):
            return True
        gradients = torch.zeros(adapters.shape, device=foundation.device)
        try:
            with torch.enable_grad():
                features = self.features_of(inputs, adapters, np.arange(foundation.depth)[None], gradients)
                self.backward(features.sum())
        except torch.OutOfMemoryError:
            raise
        except OF_MODELS:
            return False
        return True

    def _whole(self, plain: Sequence[SweepBlock]) -> dict[int, SweepBlock]:
        """Candidates in place of `plain` blocks that one op may compute, by position."""
        settings: Any = getattr(self._foundation.model, "config", None)
        fused_attention = getattr(settings, "_attn_implementation", "sdpa") == "sdpa"
        return {
            block.position: whole
            for block in plain
            if (parts := match_parts(block.block)) is not None
            and (whole := match_whole_block(block, parts, self._context, fused_attention=fused_attention)) is not None
        }

    def _of_kernels(self, plain: Sequence[SweepBlock]) -> dict[int, SweepBlock]:
        """Candidates in place of `plain` blocks of known families, by position."""
        modules = (module for block in self.blocks for module in block.modules())
        uses = Counter(id(parameter) for module in modules for parameter in module._parameters.values())
        tied = {parameter for parameter, count in uses.items() if count > 1}
        return {
            block.position: fused
            for block in plain
            if (parts := match_parts(block.block)) is not None
            and (fused := match_fused_block(block, parts, self._context, self._foundation.adapter_layout, tied))
            is not None
        }


def _without_scale(norm: nn.Module) -> nn.Module:
    """Give `norm` a scale of ones and, if it has a shift, zeros, of its own."""
    for name, parameter in norm.named_parameters():
        values = torch.ones_like(parameter) if name == "weight" else torch.zeros_like(parameter)
        setattr(norm, name, nn.Parameter(values, requires_grad=False))
    return norm


def _compare(fused: SweepBlock, agrees: dict[int, bool], position: int) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not fused.takes(args, kwargs):
            agrees[position] = False
            return
        # The fused block overwrites its input.
        args, kwargs = tree_map_only(Tensor, torch.clone, (args, kwargs))
        before = fused.arguments.hidden_states(args, kwargs).clone()
        try:
            found = fused(*args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except OF_MODELS:  # Another library's block of these names takes other arguments, or reads its Linears itself.
            agrees[position] = False
            return
        expected, found = (result[0] if isinstance(result, tuple) else result for result in (output, found))
        agrees[position] = nearly_same_change(found, expected, before)

    return hook
