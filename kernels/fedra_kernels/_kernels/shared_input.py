"""The low-rank products of the Linears that read one input, for all clients, on a CPU.

Their A lie one after another in a slot, so that what concerns the input is one batched product for all of them. The
rank stays in front, S^T = A x^T and dS^T = B^T dY^T: batched products whose result has few columns are several times
slower.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..frozen_linear import FrozenLinear
from ..groups import RowGroups, Run


@dataclass(frozen=True)
class AdapterColumns:
    """The adapter of one Linear, by its place in a slot of an adapter bank.

    Attributes:
        first_a, first_b: the columns at which A [rank, in] and B [out, rank] begin.
        scale: of the low-rank product, alpha / rank.
        trains_a, trains_b: whether the factor gets gradients.
    """

    first_a: int
    first_b: int
    rank: int
    scale: float
    trains_a: bool = True
    trains_b: bool = True


@dataclass(frozen=True)
class SharedInput:
    """Adapters of one input and scale, whose A are neighbours in their slot, and which are trained alike.

    Attributes:
        position: of the first one's Linear in the block.
        members: which of the outputs of the Linears that read the input.
        adapters: as many.
        inputs: features of the input.
        outputs: features of each output.
    """

    position: int
    members: slice
    adapters: tuple[AdapterColumns, ...]
    inputs: int
    outputs: tuple[int, ...]

    @cached_property
    def rank(self) -> int:
        """The ranks together."""
        return sum(adapter.rank for adapter in self.adapters)

    @property
    def scale(self) -> float:
        """Of the low-rank products."""
        return self.adapters[0].scale

    @property
    def trains_a(self) -> bool:
        """Whether A gets gradients."""
        return self.adapters[0].trains_a

    @property
    def trains_b(self) -> bool:
        """Whether B gets gradients."""
        return self.adapters[0].trains_b

    @property
    def trained_columns(self) -> int:
        """Columns of a slot that get gradients."""
        of_b = sum(adapter.rank * outputs for adapter, outputs in zip(self.adapters, self.outputs, strict=True))
        return self.trains_a * self.rank * self.inputs + self.trains_b * of_b

    def joined(self, other: SharedInput) -> SharedInput | None:
        """These adapters and those of the next Linear; None if they cannot be computed together."""
        alike = (other.scale, other.trains_a, other.trains_b) == (self.scale, self.trains_a, self.trains_b)
        if not alike or other.adapters[0].first_a != self.adapters[0].first_a + self.rank * self.inputs:
            return None
        members = slice(self.members.start, other.members.stop)
        return replace(
            self, members=members, adapters=self.adapters + other.adapters, outputs=self.outputs + other.outputs
        )


def share_input(
    pairs: Sequence[tuple[FrozenLinear, AdapterColumns | None]], positions: Sequence[int], *, together: bool
) -> tuple[SharedInput, ...]:
    """Put those adapters together that can be, of the Linears at `positions`, which read one input.

    Args:
        pairs: the Linears of a block and their adapters.
        together: if off, every adapter stays alone.
    """
    found: list[SharedInput] = []
    for member, position in enumerate(positions):
        linear, adapter = pairs[position]
        if adapter is None:
            continue
        outputs, inputs = linear.weight.shape
        alone = SharedInput(position, slice(member, member + 1), (adapter,), inputs, (outputs,))
        joined = found[-1].joined(alone) if together and found and found[-1].members.stop == member else None
        if joined is not None:
            found.pop()
        found.append(joined or alone)
    return tuple(found)


class Factors(NamedTuple):
    """Views of a `SharedInput` in slots: of its A together, [slots, ranks, in], and of each B, [slots, out, rank]."""

    a: Tensor
    b: list[Tensor]


class FactorViews:
    """Makes the views of all adapters of a block by one cut through the slots."""

    def __init__(self, shared: Sequence[SharedInput], size: int) -> None:
        """`shared` are all adapters of the block, `size` is the number of columns of a slot."""
        pieces: dict[int, int] = {}
        for entry in shared:
            pieces[entry.adapters[0].first_a] = entry.rank * entry.inputs
            for adapter, outputs in zip(entry.adapters, entry.outputs, strict=True):
                pieces[adapter.first_b] = adapter.rank * outputs
        self._cuts, position, numbers = list[int](), 0, dict[int, int]()
        for first in sorted(pieces):
            if first > position:
                self._cuts.append(first - position)
            numbers[first] = len(self._cuts)
            self._cuts.append(pieces[first])
            position = first + pieces[first]
        if size > position:
            self._cuts.append(size - position)
        self._shapes = [
            (
                (numbers[entry.adapters[0].first_a], entry.rank, entry.inputs),
                [
                    (numbers[adapter.first_b], outputs, adapter.rank)
                    for adapter, outputs in zip(entry.adapters, entry.outputs, strict=True)
                ],
            )
            for entry in shared
        ]

    def of(self, slots: Tensor) -> list[Factors]:
        """The views in `slots` [slots, slot size], in the order of the adapters."""
        count, pieces = slots.shape[0], slots.split_with_sizes(self._cuts, 1)
        return [
            Factors(pieces[n].view(count, rank, inputs), [pieces[m].view(count, out, r) for m, out, r in of_b])
            for (n, rank, inputs), of_b in self._shapes
        ]


def add_low_rank(
    shared: SharedInput,
    factors: Factors,
    scale: float,
    groups: RowGroups,
    x: Tensor,
    outputs: Sequence[Tensor],
    keep: Tensor | None,
) -> list[Tensor]:
    """Add scale (x A_k^T) B_k^T, of what is kept of x, in place to group k's rows of each of `outputs` [rows, out].

    Args:
        factors: of the groups' slots, in their order.
        groups: as `RowGroups.compact` makes them.
        x: [rows, in].
        scale: of the products; with dropout, also what kept entries are multiplied by.
        keep: bool [rows, in], where dropout keeps x; None for everywhere.

    Returns:
        For each run of `groups`, A_k x^T [groups, ranks, rows of a group], which `low_rank_backward` needs.
    """
    x = x if keep is None else x * keep
    saved = []
    for run in groups.runs:
        rows, lora_a, lora_b = _part(run, groups, x, factors)
        shrunk = torch.bmm(lora_a, rows.transpose(1, 2))
        saved.append(shrunk)
        for part, factor, y in zip(_by_adapter(shared, shrunk), lora_b, outputs, strict=True):
            _grouped(y, run, groups).baddbmm_(part.transpose(1, 2), factor.transpose(1, 2), alpha=scale)
    return saved


def low_rank_backward(
    shared: SharedInput,
    factors: Factors,
    scale: float,
    sinks: Factors | None,
    groups: RowGroups,
    x: Tensor | None,
    saved: Sequence[Tensor],
    grads: Sequence[Tensor],
    grad_x: Tensor | None,
    keep: Tensor | None,
) -> None:
    """Write dA and dB, for `grads` of the outputs, to `sinks`, and add to `grad_x` what x gets through A.

    Args:
        sinks: shaped as `factors`; None for no gradients.
        x: None where A is frozen.
        saved: what `add_low_rank` returned.
        grad_x: [rows, in]; None if it is not needed.
    """
    x = x if x is None or keep is None else x * keep
    for run, shrunk in zip(groups.runs, saved, strict=True):
        of_run = [_grouped(grad, run, groups) for grad in grads]
        _, lora_a, lora_b = _part(run, groups, None, factors)
        if sinks is not None and shared.trains_b:
            for part, grad, sink in zip(_by_adapter(shared, shrunk), of_run, sinks.b, strict=True):
                torch.mul(torch.bmm(part, grad).transpose(1, 2), scale, out=_slots(sink, run, groups))
        if grad_x is None and (sinks is None or x is None):
            continue
        pairs = zip(lora_b, of_run, strict=True)
        parts = [torch.bmm(factor.transpose(1, 2), grad.transpose(1, 2)) for factor, grad in pairs]
        grad_shrunk = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        if sinks is not None and x is not None:
            product = torch.bmm(grad_shrunk, _grouped(x, run, groups))
            torch.mul(product, scale, out=_slots(sinks.a, run, groups))
        if grad_x is None:
            continue
        target, left = _grouped(grad_x, run, groups), grad_shrunk.transpose(1, 2)
        if keep is None:
            target.baddbmm_(left, lora_a, alpha=scale)
        else:
            target.addcmul_(torch.bmm(left, lora_a), _grouped(keep, run, groups), value=scale)


def _part(run: Run, groups: RowGroups, x: Tensor | None, factors: Factors) -> tuple[Any, Tensor, list[Tensor]]:
    """The rows of a run in x, and its slots of the factors."""
    rows = None if x is None else _grouped(x, run, groups)
    return rows, _slots(factors.a, run, groups), [_slots(factor, run, groups) for factor in factors.b]


def _grouped(rows: Tensor, run: Run, groups: RowGroups) -> Tensor:
    """The run's rows of a matrix [rows, features], by group: [groups, rows of a group, features]."""
    part = rows if len(groups.runs) == 1 else rows[run.rows]
    return part.view(run.count, run.size, rows.shape[1])


def _slots(factor: Tensor, run: Run, groups: RowGroups) -> Tensor:
    """The run's slots of a factor; most steps have one run, and every slice costs as much as a small product."""
    return factor if len(groups.runs) == 1 else factor[run.slots]


def _by_adapter(shared: SharedInput, shrunk: Tensor) -> Sequence[Tensor]:
    """Each adapter's rows of [groups, ranks, rows]."""
    if len(shared.adapters) == 1:
        return (shrunk,)
    return shrunk.split_with_sizes([adapter.rank for adapter in shared.adapters], 1)
