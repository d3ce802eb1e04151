"""The server's trainable state, and which part of it predicts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedra_engine.models.adapters import AdapterLayout
from fedra_engine.models.task import HeadLayout


@dataclass(frozen=True)
class GlobalState:
    """What the server keeps from round to round.

    Attributes:
        adapters: the global adapters [blocks, slot size].
        heads: the global classifiers [exits, head size]; one, unless a method has early exits. The last is the
            model's own.
        base: weights of the adapter targets, per target [blocks, out, in], where a method writes into the frozen
            model; empty: they are as loaded.
    """

    adapters: Tensor
    heads: Tensor
    base: tuple[Tensor, ...] = ()

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, for a checkpoint."""
        named = {"adapters": self.adapters, "heads": self.heads}
        return named | {f"base.{target}": weights for target, weights in enumerate(self.base)}

    def restored(self, tensors: Mapping[str, Tensor]) -> GlobalState:
        """A state shaped and placed like this one with the values that `tensors` gave."""
        base = tuple(tensors[f"base.{target}"].to(weights) for target, weights in enumerate(self.base))
        return GlobalState(tensors["adapters"].to(self.adapters), tensors["heads"].to(self.heads), base)


@dataclass(frozen=True)
class EvaluatedModel:
    """Which part of a state predicts.

    Attributes:
        blocks: int64 [blocks], ascending, the blocks of the model.
        exits: ascending blocks after which a classifier sits; logits are averaged over all of them. Empty: the
            one classifier at the end.
    """

    blocks: NDArray[np.int64]
    exits: tuple[int, ...] = ()


def named_tensors(state: GlobalState, adapters: AdapterLayout, head: HeadLayout) -> dict[str, Tensor]:
    """All tensors of a state by name, as `adapter_tensors` and `head_tensors` have them."""
    named = adapter_tensors(range(len(state.adapters)), state.adapters, adapters)
    return named | head_tensors(range(len(state.heads)), state.heads, head, exits=len(state.heads))


def adapter_tensors(blocks: Iterable[int], adapters: Tensor, layout: AdapterLayout) -> dict[str, Tensor]:
    """`blocks.<block>.<target path>.lora_A|lora_B` of slots `adapters` [blocks, slot size], each contiguous."""
    return {
        f"blocks.{block}.{name}": factor.contiguous()
        for block, slot in zip(blocks, adapters, strict=True)
        for name, factor in layout.named_factors(slot)
    }


def head_tensors(indices: Iterable[int], heads: Tensor, layout: HeadLayout, *, exits: int) -> dict[str, Tensor]:
    """`weight` [classes, features] and `bias` [classes] of `heads` [n, head size], the classifiers `indices`.

    The last of all `exits` is `head`, an earlier one `exits.<index>`. No bias where the classifier has none, and
    nothing of a head that is not trained.
    """
    named = dict[str, Tensor]()
    for index, head in zip(indices, heads, strict=True) if layout.size else ():
        name = "head" if index == exits - 1 else f"exits.{index}"
        named[f"{name}.weight"] = layout.weight(head).contiguous()
        if layout.has_bias:
            named[f"{name}.bias"] = layout.bias(head).contiguous()
    return named
