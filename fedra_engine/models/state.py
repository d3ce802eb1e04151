"""The server's trainable state."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedra_engine.models.adapters import AdapterLayout
from fedra_engine.models.heads import HeadLayout


@dataclass(frozen=True)
class GlobalState:
    """The global adapters [blocks, slot size] and the global head [head size]."""

    adapters: Tensor
    head: Tensor


def named_tensors(state: GlobalState, adapters: AdapterLayout, head: HeadLayout) -> dict[str, Tensor]:
    """`blocks.<block>.<target path>.lora_A|lora_B`, `head.weight`, `head.bias`, each contiguous."""
    tensors = {
        f"blocks.{block}.{name}": factor.contiguous()
        for block, slot in enumerate(state.adapters)
        for name, factor in adapters.named_factors(slot)
    }
    return tensors | head_tensors(state.head, head)


def head_tensors(head: Tensor, layout: HeadLayout) -> dict[str, Tensor]:
    """`head.weight` [classes, features] and `head.bias` [classes] of a head vector [size], each contiguous."""
    return {
        "head.weight": layout.weight(head[None])[0].contiguous(),
        "head.bias": layout.bias(head[None])[0].contiguous(),
    }
