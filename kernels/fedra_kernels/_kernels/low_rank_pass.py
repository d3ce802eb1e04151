"""The low-rank products of a whole block in one pass, forward and backward, on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..dropout import Dropout, keep_mask
from ..frozen_linear import FrozenLinear
from ..groups import RowGroups, add_to_bank
from .computed_rows import ComputedRows
from .shared_input import SharedInput, add_low_rank, low_rank_backward

if TYPE_CHECKING:
    from ..pre_norm_block import BlockAdapters


class LowRankPass:
    """The low-rank products of a block in a pass.

    Attributes:
        slots: [groups, slot size], the adapters of each group that has rows, one after another, so that the small
            products of all groups need no copies of their factors.
        saved: what backward needs: of each of `BlockAdapters.shared` the input, what dropout keeps, and A x^T by run.
    """

    def __init__(
        self,
        adapters: BlockAdapters,
        groups: RowGroups,
        computed: ComputedRows,
        slots: Tensor,
        dropout: Sequence[Dropout | None],
        saved: Sequence[Tensor | None] = (),
        gradients: Tensor | None = None,
    ) -> None:
        """In forward `saved` and `gradients` are left out; in backward they are what forward saved, and the bank's."""
        self.slots = slots
        self.saved: list[Any] = list(saved)
        self._groups, self._computed, self._dropout = groups, computed, dropout
        self._of_inputs = (
            groups.compact,
            *[groups.with_first_tokens(computed.first_token_groups, computed.tokens)] * 3,
        )
        """The groups of what the Linears read, as in `BlockAdapters.shared`."""
        self._factors, self._sinks = adapters.factors(slots), None
        self._gradients, self._sink = gradients, None
        if gradients is not None:
            make = torch.empty_like if adapters.complete else torch.zeros_like
            self._sink = make(slots, dtype=gradients.dtype)
            self._sinks = adapters.factors(self._sink)

    def add(self, read: int, x: Tensor, outputs: Sequence[Tensor]) -> None:
        """Add the low-rank products of x, which is input number `read`, to the `outputs` of the Linears that read it.

        Call it in the order of the inputs.
        """
        for shared, factors in self._factors[read]:
            drop = self._dropout[shared.position] if self._dropout else None
            keep = None if drop is None else keep_mask(drop, self._groups.sizes, x.shape[1])
            if keep is not None and read > 0:
                keep = self._computed.select(keep)
            groups = self._of_inputs[read]
            shrunk = add_low_rank(shared, factors, self._scale(shared), groups, x, outputs[shared.members], keep)
            self.saved += [x if shared.trains_a else None, keep, *shrunk]

    def add_to(self, rows: Tensor, read: int, x: Tensor, linear: FrozenLinear, scale: Tensor | None) -> Tensor:
        """A new tensor: rows + scale · the output of the Linear, with its adapters, for x."""
        y = linear.forward(x, rows if scale is None else None)
        self.add(read, x, [y])
        return y if scale is None else y.mul_(scale).add_(rows)

    def backward(self, read: int, grads: Sequence[Tensor], grad_x: Tensor | None) -> None:
        """Take the gradients of what `add` added to, and add to x's. In the reverse order of the inputs."""
        groups = self._of_inputs[read]
        length = 2 + len(groups.runs)
        for number, (shared, factors) in reversed(list(enumerate(self._factors[read]))):
            x, keep, *shrunk = self.saved[-length:]
            del self.saved[-length:]
            sinks = None if self._sinks is None else self._sinks[read][number][1]
            low_rank_backward(
                shared, factors, self._scale(shared), sinks, groups,
                x, shrunk, grads[shared.members], grad_x, keep,
            )  # fmt: skip

    def _scale(self, shared: SharedInput) -> float:
        """With what dropout multiplies kept entries by: exactly, which a mask in 16 bits would not be."""
        drop = self._dropout[shared.position] if self._dropout else None
        return shared.scale if drop is None else shared.scale / (1.0 - drop.p)

    def deposit(self) -> None:
        """Add the gradients to those of the bank."""
        if self._gradients is not None and self._sink is not None:
            add_to_bank(self._gradients, self._groups.filled_slots, self._sink)
