"""What autograd keeps of a sample while a client trains its sub-model by itself, measured by running one.

The adapters are small modules of this file that keep what PEFT's layers keep: importing PEFT takes longer than
importing torch, and every run counts its costs.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedra_engine.config import LoraConfig
from fedra_engine.data.samples import Samples
from fedra_engine.execution.dropout import CounterDropout, DropoutKeys
from fedra_engine.execution.memory import record_saved
from fedra_engine.models.adapters import Factor, Target
from fedra_engine.models.foundation import Foundation, cut_to_blocks, replace_module


def kept_of_a_sample(
    foundation: Foundation, samples: Samples, lora: LoraConfig, rank: int, factors: Factor
) -> NDArray[np.float64]:
    """Bytes that autograd keeps of one sample in each block and, last, outside the blocks, [blocks + 1].

    It is the difference between a pass of two samples and a pass of one, both the longest, through a client's model
    with all blocks, adapters of `rank`, and the trained `factors`.
    """
    keys = DropoutKeys(lora.dropout, seed=0, round=0, clients=[0], steps=[0])
    model = _adapted_model(foundation, rank, factors, keys)
    longest = 0 if samples.lengths is None else int(samples.lengths.argmax())
    one, two = (
        _kept_bytes(
            foundation, model, samples.inputs(torch.full((count,), longest), foundation.device, foundation.dtype)
        )
        for count in (1, 2)
    )
    return two - one


class _AdaptedLinear(nn.Module):
    """A frozen target of PEFT's LoRA, with a product of zeros: only shapes matter."""

    def __init__(self, linear: nn.Module, target: Target, factors: Factor, like: Tensor, dropout: nn.Module) -> None:
        super().__init__()
        self._linear, self._scale, self._dropout = linear, target.scale, dropout
        zeros = like.new_zeros(target.rank, target.in_features), like.new_zeros(target.out_features, target.rank)
        self._a, self._b = (
            nn.Parameter(factor, requires_grad=factors in ("both", name))
            for factor, name in zip(zeros, ("A", "B"), strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        frozen: Tensor = self._linear(x)
        product = nn.functional.linear(self._dropout(x.to(self._a.dtype)), self._a)
        return (frozen + nn.functional.linear(product, self._b) * self._scale).to(frozen.dtype)


def _adapted_model(foundation: Foundation, rank: int, factors: Factor, keys: DropoutKeys) -> nn.Module:
    """A copy of the foundation's module tree with adapters and a classifier to train; frozen weights are shared."""
    model = cut_to_blocks(foundation, range(foundation.depth))
    like = torch.empty(0, dtype=foundation.adapter_dtype, device=foundation.device)
    targets = foundation.adapter_layout.of_rank(rank).targets
    for block in np.flatnonzero(foundation.adapted).tolist():
        for index, target in enumerate(targets):
            dropout: nn.Module = nn.Identity()
            if keys.p > 0:
                dropout = CounterDropout(block, index)
                dropout.keys = keys
            path = f"{foundation.block_path}.{block}.{target.path}"
            linear = model.get_submodule(path)
            replace_module(model, path, _AdaptedLinear(linear, target, factors, like, dropout))
    head = foundation.initial_heads()[-1]
    norm = foundation.make_norm(head)
    if norm is not None and foundation.norm_path is not None:
        replace_module(model, foundation.norm_path, norm)
    replace_module(model, foundation.head_path, foundation.task.make_head(head))
    return model


def _kept_bytes(foundation: Foundation, model: nn.Module, inputs: dict[str, Tensor]) -> NDArray[np.float64]:
    """Bytes that autograd keeps of a pass in each block and, last, elsewhere, without weights."""
    fixed = (*model.parameters(), *model.buffers())
    kept, place = np.zeros(foundation.depth + 1), -1

    def losses() -> Tensor:
        return nn.functional.log_softmax(model(**inputs).logits, dim=-1).sum()

    def enter(index: int) -> None:
        nonlocal place
        place = index

    def record(size: int) -> None:
        kept[place] += size

    hooks = []
    for index, block in enumerate(model.get_submodule(foundation.block_path).children()):
        hooks.append(block.register_forward_pre_hook(lambda *_, index=index: enter(index)))
        hooks.append(block.register_forward_hook(lambda *_: enter(-1)))
    record_saved(losses, fixed, record)
    for hook in hooks:
        hook.remove()
    return kept
