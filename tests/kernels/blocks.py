"""A transformer MLP branch for a cohort of clients, fused from the ops and in plain torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedra_kernels import (
    gather_norm,
    gather_norm_reference,
    gelu,
    lora_linear,
    lora_linear_reference,
    scatter_add,
    scatter_add_reference,
)

from .cases import LoraCase, lora_case
from .helpers import SCALE, randn


@dataclass
class Branch:
    """fc1 and fc2 of one block, its norm and LayerScale, the residual stream and the rows that hold the block."""

    first: LoraCase
    second: LoraCase
    hidden: Tensor
    index: Tensor
    norm: Tensor
    layer_scale: Tensor

    def fused(self, hidden: Tensor, sinks: list[Tensor]) -> Tensor:
        """Four ops: the norm and the activation make S for the layers that read them."""
        groups = self.first.groups
        drops = () if self.first.dropout is None else (self.first.dropout,)
        x, (shrunk,) = gather_norm(
            hidden, self.index, self.norm, self.norm, kind="layer", eps=1e-5,
            lora_a=[self.first.lora_a], groups=groups, dropout=drops,
        )  # fmt: skip
        x = self._linear(self.first, x, sinks[:2], shrunk)
        x, produced = gelu(x, lora_a=self.second.lora_a, groups=groups, dropout=self.second.dropout)
        x = self._linear(self.second, x, sinks[2:], produced)
        return scatter_add(hidden, x, self.index, self.layer_scale)

    def plain(self, hidden: Tensor, banks: list[Tensor]) -> Tensor:
        x = gather_norm_reference(
            hidden, self.index, self.norm.to(hidden), self.norm.to(hidden), kind="layer", eps=1e-5
        )
        x = torch.nn.functional.gelu(self._reference(self.first, x, banks[:2]))
        x = self._reference(self.second, x, banks[2:])
        return scatter_add_reference(hidden, x, self.index, self.layer_scale.to(hidden))

    def run_fused(self) -> dict[str, Tensor]:
        leaf = self.hidden.clone().requires_grad_()
        sinks = [case._sink(bank) for case in (self.first, self.second) for bank in (case.lora_a, case.lora_b)]
        out = self.fused(leaf * 1.0, sinks)
        out.backward(torch.ones_like(out))
        return self._results(out, leaf.grad, sinks)

    def run_plain(self) -> dict[str, Tensor]:
        """The same in float64."""
        leaf = self.hidden.double().requires_grad_()
        banks = [
            bank.double().requires_grad_() for case in (self.first, self.second) for bank in (case.lora_a, case.lora_b)
        ]
        out = self.plain(leaf, banks)
        out.backward(torch.ones_like(out))
        return self._results(out, leaf.grad, [bank.grad for bank in banks])

    def _results(self, out: Tensor, grad: Tensor, sinks: list[Tensor]) -> dict[str, Tensor]:
        used = list(self.first.groups.host_slots)
        names = ("a1", "b1", "a2", "b2")
        return {"out": out, "hidden": grad} | {n: sink[used] for n, sink in zip(names, sinks, strict=True)}

    @staticmethod
    def _linear(case: LoraCase, x: Tensor, sinks: list[Tensor], shrunk: Tensor | None) -> Tensor:
        return lora_linear(
            x, case.weight, case.bias, case.lora_a, case.lora_b, case.groups, SCALE, *sinks, case.dropout, shrunk=shrunk
        )

    @staticmethod
    def _reference(case: LoraCase, x: Tensor, banks: list[Tensor]) -> Tensor:
        weight, bias = case.weight.to(x), case.bias.to(x)
        return lora_linear_reference(x, weight, bias, *banks, case.groups, SCALE, case.dropout)


def mlp_branch(dtype: torch.dtype, dropout: float | None, ranks: tuple[int, ...] = (8, 3)) -> Branch:
    sizes, width, inner = [20, 0, 1, 17], 32, 64
    first = lora_case(sizes, inputs=width, outputs=inner, ranks=ranks, dtype=dtype, dropout=dropout, seed=1)
    second = lora_case(sizes, inputs=inner, outputs=width, ranks=ranks, dtype=dtype, dropout=dropout, seed=2)
    return Branch(
        first=first,
        second=second,
        hidden=randn(50, width, seed=3).to(dtype),
        index=torch.randperm(50, generator=torch.Generator().manual_seed(4))[:38],
        norm=(1.0 + 0.1 * randn(width, seed=5)).to(dtype),
        layer_scale=randn(width, seed=6).to(dtype),
    )
