"""The server's trainable state."""

from __future__ import annotations

from collections.abc import Iterable
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
    """All tensors of a state by name, as `adapter_tensors` and `head_tensors` have them."""
    return adapter_tensors(range(len(state.adapters)), state.adapters, adapters) | head_tensors(state.head, head)


def adapter_tensors(blocks: Iterable[int], adapters: Tensor, layout: AdapterLayout) -> dict[str, Tensor]:
    """`blocks.<block>.<target path>.lora_A|lora_B` of slots `adapters` [blocks, slot size], each contiguous."""
    return {
        f"blocks.{block}.{name}": factor.contiguous()
        for block, slot in zip(blocks, adapters, strict=True)
        for name, factor in layout.named_factors(slot)
    }


def head_tensors(head: Tensor, layout: HeadLayout) -> dict[str, Tensor]:
    """`head.weight` [classes, features] and `head.bias` [classes] of a head vector [size], each contiguous."""
    return {"head.weight": layout.weight(head).contiguous(), "head.bias": layout.bias(head).contiguous()}
