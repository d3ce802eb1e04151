"""Random grouped problems whose every byte outside the problem is NaN."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedra_kernels import Dropout, RowGroups, dropout_key, lora_linear, lora_linear_reference

from .helpers import SCALE, relative_error

MARGIN = 8
"""NaN rows before and after every matrix."""

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 5e-3}


def surrounded(values: Tensor) -> Tensor:
    """The same values as a view into a larger buffer of NaN; whole numbers amid one that is no index."""
    poison = float("nan") if values.is_floating_point() else -(10**15)
    buffer = values.new_full((values.shape[0] + 2 * MARGIN, *values.shape[1:]), poison)
    view = buffer[MARGIN : MARGIN + values.shape[0]]
    view.copy_(values)
    return view


@dataclass
class LoraCase:
    """Inputs of one `lora_linear` call and the upstream gradient."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    groups: RowGroups
    grad_y: Tensor
    dropout: Dropout | None
    ranks: tuple[int, ...]

    def run(self, *, frozen: Sequence[str] = (), grad_x: bool = True) -> dict[str, Tensor]:
        """y and all gradients, without those of `frozen` factors; the sinks of untouched slots start as NaN."""
        x, lora_b = self.x.detach().requires_grad_(grad_x), self.lora_b.detach().requires_grad_()
        sinks = {name: self._sink(bank) for name, bank in (("grad_a", self.lora_a), ("grad_b", self.lora_b))}
        given = {name: sink for name, sink in sinks.items() if name not in frozen}
        y = lora_linear(
            x, self.weight, self.bias, self.lora_a, lora_b, self.groups, SCALE,
            given.get("grad_a"), given.get("grad_b"), self.dropout,
        )  # fmt: skip
        y.backward(self.grad_y)
        used = list(self.groups.host_slots)
        unused = [slot for slot in range(len(self.lora_a)) if slot not in used]
        for sink in given.values():
            assert sink[unused].isnan().all(), "the sink of a slot without rows was touched"
        gradients = {"grad_x": x.grad} if grad_x else {}
        return {"y": y.detach(), **gradients} | {name: sink[used] for name, sink in given.items()}

    def expected(self) -> dict[str, Tensor]:
        """The reference's results in float64, from the same rounded inputs."""
        x, a, b = (t.detach().double().requires_grad_() for t in (self.x, self.lora_a, self.lora_b))
        bias = None if self.bias is None else self.bias.double()
        weight = x.new_zeros(b.shape[1], x.shape[1]) if self.weight is None else self.weight.double()
        y = lora_linear_reference(x, weight, bias, a, b, self.groups, SCALE, self.dropout)
        grads = torch.autograd.grad(y, (x, a, b), self.grad_y.double(), materialize_grads=True)
        used = list(self.groups.host_slots)
        return {"y": y.detach(), "grad_x": grads[0], "grad_a": grads[1][used], "grad_b": grads[2][used]}

    def _sink(self, bank: Tensor) -> Tensor:
        sink = torch.full(bank.shape, float("nan"), device=bank.device)
        sink[list(self.groups.host_slots)] = 0.0
        return sink

    def to(self, device: str) -> LoraCase:
        groups, dropout = self.groups, self.dropout
        return LoraCase(
            *(None if t is None else t.to(device) for t in (self.x, self.weight, self.bias)),
            self.lora_a.to(device),
            self.lora_b.to(device),
            RowGroups(groups.sizes, torch.tensor(groups.host_slots), device),
            self.grad_y.to(device),
            None if dropout is None else Dropout(dropout.p, dropout.keys.to(device)),
            self.ranks,
        )


def lora_case(
    sizes: Sequence[int],
    *,
    inputs: int = 48,
    outputs: int = 40,
    ranks: Sequence[int] = (8,),
    dtype: torch.dtype = torch.float32,
    weight: bool = True,
    bias: bool = True,
    dropout: float | None = None,
    seed: int = 0,
    slots: Sequence[int] | None = None,
) -> LoraCase:
    """Group g has rank ranks[g % len(ranks)], zero-padded to the largest. Without `weight` there is no bias.

    Every client's numbers depend on its slot alone, never on the clients beside it.
    """
    if slots is None:
        slots = [2 * number + 1 for number in range(len(sizes))]
    rank = max(ranks)
    used = [ranks[slot % len(ranks)] for slot in slots]
    bank_size = max(slots, default=0) + 2
    nan = torch.full((bank_size, rank * (inputs + outputs) + 5), float("nan"), dtype=dtype)
    lora_a = nan[:, : rank * inputs].view(bank_size, rank, inputs)
    lora_b = nan[:, rank * inputs : rank * (inputs + outputs)].view(bank_size, outputs, rank)
    parts, upstream = [], []
    for size, slot, own_rank in zip(sizes, slots, used, strict=True):
        generator = torch.Generator().manual_seed(seed + 1000 * slot)

        def draw(*shape: int, generator: torch.Generator = generator) -> Tensor:
            return torch.randn(*shape, generator=generator)

        lora_a[slot], lora_b[slot] = 0.0, 0.0
        lora_a[slot, :own_rank] = (draw(own_rank, inputs) / inputs**0.5).to(dtype)
        lora_b[slot, :, :own_rank] = draw(outputs, own_rank).to(dtype)
        parts.append(draw(size, inputs))
        upstream.append(draw(size, outputs))
    generator = torch.Generator().manual_seed(seed)
    frozen = surrounded((torch.randn(outputs, inputs, generator=generator) / inputs**0.5).to(dtype))
    bias_values = torch.randn(outputs, generator=generator).to(dtype)
    groups = RowGroups(sizes, torch.tensor(slots, dtype=torch.int64))
    keys = torch.tensor([dropout_key(seed, slot) for slot in slots], dtype=torch.int64)
    return LoraCase(
        x=surrounded(torch.cat([torch.empty(0, inputs), *parts]).to(dtype)),
        weight=frozen if weight else None,
        bias=surrounded(bias_values) if weight and bias else None,
        lora_a=lora_a,
        lora_b=lora_b,
        groups=groups,
        grad_y=surrounded(torch.cat([torch.empty(0, outputs), *upstream]).to(dtype)),
        dropout=None if dropout is None else Dropout(dropout, keys),
        ranks=tuple(used),
    )


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Each tensor's relative error is within the tolerance; NaN fails."""
    for name, want in expected.items():
        error = relative_error(found[name], want)
        assert error <= tolerance, f"{name}: relative error {error:.2e}, tolerance {tolerance:.0e}"
