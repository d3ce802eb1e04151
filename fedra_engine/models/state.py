"""The server's trainable state, and the part of it that is evaluated."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedra_engine.models.adapters import AdapterLayout
from fedra_engine.models.stand_ins import StandIns
from fedra_engine.models.task import HeadLayout


@dataclass(frozen=True)
class GlobalState:
    """The global model's trainable state.

    Attributes:
        adapters: [blocks, slot size].
        heads: classifiers [exits, head size]; one, unless a method has early exits. The last is the model's own.
        base: weights of the adapter targets, per target [blocks, out, in], for a method that changes the frozen model;
            empty if they are as loaded.
        stand_ins: what clients have in place of blocks that they do not hold; None before they are fitted, and if
            there are none.
    """

    adapters: Tensor
    heads: Tensor
    base: tuple[Tensor, ...] = ()
    stand_ins: StandIns | None = None

    def __repr__(self) -> str:
        more = "".join([", base weights" if self.base else "", "" if self.stand_ins is None else ", stand-ins"])
        return f"GlobalState(adapters {[*self.adapters.shape]}, heads {[*self.heads.shape]}{more})"

    def tensors(self) -> dict[str, Tensor]:
        """Tensors by name, for a checkpoint."""
        named = {"adapters": self.adapters, "heads": self.heads}
        maps = {} if self.stand_ins is None else self.stand_ins._asdict()
        named |= {f"base.{target}": weights for target, weights in enumerate(self.base)}
        return named | {f"stand_ins.{name}": tensor for name, tensor in maps.items()}

    def restored(self, tensors: Mapping[str, Tensor]) -> GlobalState:
        """The state that `tensors()` returned, with the dtypes and devices of this one."""
        base = tuple(tensors[f"base.{target}"].to(weights) for target, weights in enumerate(self.base))
        stand_ins = None
        if "stand_ins.mean" in tensors:
            stand_ins = StandIns(*(tensors[f"stand_ins.{name}"].to(self.adapters) for name in StandIns._fields))
        return GlobalState(tensors["adapters"].to(self.adapters), tensors["heads"].to(self.heads), base, stand_ins)


@dataclass(frozen=True)
class EvaluatedModel:
    """The sub-model of a state to evaluate.

    Attributes:
        blocks: int64 [blocks], ascending.
        exits: blocks after which there is a classifier, ascending; their logits are averaged. Empty if there is only
            the classifier at the end.
    """

    blocks: NDArray[np.int64]
    exits: tuple[int, ...] = ()


def block_changes(state: GlobalState, initial: GlobalState, layout: AdapterLayout) -> Tensor:
    """How far tuning has moved the weights of each block, float64 [blocks].

    It is the Frobenius norm, over all adapter targets of a block, of scale · B·A plus what the method has added to the
    frozen weights since the `initial` state.
    """
    squares = state.adapters.new_zeros(len(state.adapters), dtype=torch.float64)
    for target, scale in enumerate(each.scale for each in layout.targets):
        a, b = (factor(state.adapters, target).double() for factor in (layout.lora_a, layout.lora_b))
        if not state.base:
            # ‖B·A‖² is the inner product of BᵀB and A·Aᵀ, which are small.
            squares += scale**2 * ((b.mT @ b) * (a @ a.mT)).sum((1, 2))
            continue
        for block, weights in enumerate(state.base[target]):
            change = weights.double() - initial.base[target][block].double() + scale * (b[block] @ a[block])
            squares[block] += change.square().sum()
    return squares.clamp(min=0).sqrt()


def named_tensors(state: GlobalState, adapters: AdapterLayout, head: HeadLayout) -> dict[str, Tensor]:
    """The adapters and heads of a state, by the names of `adapter_tensors` and `head_tensors`."""
    named = adapter_tensors(range(len(state.adapters)), state.adapters, adapters)
    return named | head_tensors(range(len(state.heads)), state.heads, head, exits=len(state.heads))


def adapter_tensors(blocks: Iterable[int], adapters: Tensor, layout: AdapterLayout) -> dict[str, Tensor]:
    """Contiguous factors by name, `blocks.<block>.<target path>.lora_A|lora_B`, of slots [blocks, slot size]."""
    return {
        f"blocks.{block}.{name}": factor.contiguous()
        for block, slot in zip(blocks, adapters, strict=True)
        for name, factor in layout.named_factors(slot)
    }


def head_tensors(indices: Iterable[int], heads: Tensor, layout: HeadLayout, *, exits: int) -> dict[str, Tensor]:
    """`<name>.weight` [classes, features] and `<name>.bias` [classes] of `heads` [n, head size], at exits `indices`.

    The last of all `exits` is named `head`, an earlier one `exits.<index>`. Heads that are not trained are left out.
    Trained norms are `norm.weight` and `norm.bias`, and `exits.<index>.norm.…`.
    """
    named = dict[str, Tensor]()
    for index, head in zip(indices, heads, strict=True) if layout.size else ():
        name, norm = ("head", "norm") if index == exits - 1 else (f"exits.{index}", f"exits.{index}.norm")
        for part, values in layout.norm_parameters(head).items():
            named[f"{norm}.{part}"] = values.contiguous()
        if layout.classes == 0:
            continue
        named[f"{name}.weight"] = layout.weight(head).contiguous()
        if layout.has_bias:
            named[f"{name}.bias"] = layout.bias(head).contiguous()
    return named
