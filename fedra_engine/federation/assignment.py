"""What a method asks of the participants of a round: which blocks they hold, and what of them they train."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedra_engine.federation.allocation import Allocation
from fedra_engine.federation.local_terms import LocalTerm
from fedra_engine.models.adapters import AdapterLayout, Factor
from fedra_engine.runtime.errors import count_of, span

HandOut = Callable[[int, NDArray[np.int64], Tensor], None]
"""Called with a client, its blocks and their slots [blocks, slot size], filled from the global adapters; overwrites
these in place with what the client keeps locally."""


@dataclass(frozen=True)
class Assignment:
    """What each participant of a round holds and trains.

    Attributes:
        held: bool [participants, blocks], the blocks of each participant's sub-model.
        trained: bool [participants, blocks], the held blocks whose adapters are trained; all of `held` when None.
        factors: the LoRA factors that are trained.
        ranks: int64 [participants], LoRA ranks, full when None; global adapters are truncated to them. The scale of
            the adapter's product does not depend on the rank.
        terms: the method's terms of the local loss.
        exits: ascending blocks that are followed by a classifier of their own. A participant trains the classifiers
            after blocks that it holds, and must hold one such block. Empty: one classifier after the last block.
        shared_end: whether all participants also train one more classifier, the model's last, after the last block of
            their own sub-models, whatever its depth; then only exits before that block count.
        distillation: weight of the mutual distillation between a participant's exits.
        hand_out: restores the part of the adapters that clients keep locally.
        replaced: bool [participants, blocks], blocks that stand-ins replace in each participant's sub-model; none
            when None.
    """

    held: Allocation
    trained: Allocation | None = None
    factors: Factor = "both"
    ranks: NDArray[np.int64] | None = None
    terms: tuple[LocalTerm, ...] = ()
    exits: tuple[int, ...] = ()
    shared_end: bool = False
    distillation: float = 0.0
    hand_out: HandOut | None = None
    replaced: Allocation | None = None

    def __post_init__(self) -> None:
        """Raise ValueError when a participant holds blocks but reaches no exit."""
        if self.exits and not (self.has_exit.any(axis=1) | ~self.held.any(axis=1)).all():
            raise ValueError(f"exits: found a participant that holds blocks but none of {self.exits}, expected one")

    def __repr__(self) -> str:
        people, depth = self.held.shape
        if not people:
            return "Assignment(nobody)"
        held = f"{span(self.held.sum(axis=1).tolist())} of {count_of(depth, 'block')}"
        trained = "" if self.trained is None else f", train {span(self.trained.sum(axis=1).tolist())}"
        return f"Assignment({count_of(people, 'participant')} hold{'s' if people == 1 else ''} {held}{trained})"

    @property
    def trained_blocks(self) -> Allocation:
        """bool [participants, blocks], the blocks whose adapters each participant trains."""
        return self.held if self.trained is None else self.trained

    @property
    def reached(self) -> Allocation:
        """bool [participants, blocks], the held blocks that backward reaches: from the first trained one on."""
        return self.held & (self.trained_blocks.cumsum(axis=1) > 0)

    @cached_property
    def has_exit(self) -> NDArray[np.bool_]:
        """bool [participants, classifiers], the classifiers that each participant trains."""
        early = self.held[:, list(self.exits)]
        if self.exits and not self.shared_end:
            return early
        last = self.held.shape[1] - 1 - self.held[:, ::-1].argmax(axis=1)
        early &= last[:, None] > np.array(self.exits, dtype=np.int64)
        return np.pad(early, ((0, 0), (0, 1)), constant_values=True)

    @property
    def replaced_blocks(self) -> Allocation:
        """`replaced`, bool [participants, blocks] in any case."""
        return np.zeros_like(self.held) if self.replaced is None else self.replaced

    def with_stand_ins(self, blocks: NDArray[np.int64]) -> Assignment:
        """Let stand-ins replace those of the global model's `blocks` that participants lack before their last exit."""
        replaced = np.zeros_like(self.held)
        replaced[:, blocks] = ~self.held[:, blocks]
        if self.exits and not self.shared_end:
            last = np.where(self.has_exit, self.exits, -1).max(axis=1)
            replaced &= np.arange(self.held.shape[1]) <= last[:, None]
        return replace(self, replaced=replaced)

    def training_only(self, blocks: NDArray[np.bool_]) -> Assignment:
        """The same, but nobody trains adapters of other than these `blocks`, bool [blocks]."""
        return self if blocks.all() else replace(self, trained=self.trained_blocks & blocks)

    def exits_of(self, row: int) -> NDArray[np.int64]:
        """Indices of the classifiers that the participant in `row` trains, ascending int64 [exits]."""
        return np.flatnonzero(self.has_exit[row])

    def make_own(self, row: int, client: int, blocks: NDArray[np.int64], slots: Tensor, layout: AdapterLayout) -> None:
        """Turn `slots` [blocks, slot size] of the global adapters, in place, into the start of the client in `row`."""
        if self.hand_out is not None:
            self.hand_out(client, blocks, slots)
        if self.ranks is not None:
            layout.truncate(slots, int(self.ranks[row]))

    def select(self, rows: NDArray[np.int64]) -> Assignment:
        """The assignment of the participants in `rows`."""
        return replace(
            self,
            held=self.held[rows],
            trained=None if self.trained is None else self.trained[rows],
            ranks=None if self.ranks is None else self.ranks[rows],
            replaced=None if self.replaced is None else self.replaced[rows],
        )
