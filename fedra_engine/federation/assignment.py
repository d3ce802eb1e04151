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

HandOut = Callable[[int, NDArray[np.int64], Tensor], None]
"""Called with a client, the blocks it holds and its slots [held, slot size], filled from the global adapters; may
overwrite them with what the client kept to itself."""


@dataclass(frozen=True)
class Assignment:
    """Who holds what, and what of it each participant trains.

    Attributes:
        held: bool [participants, blocks], the blocks of each participant's own model.
        trained: bool [participants, blocks], those of them whose adapters it trains, all of `held` when None; the
            others stay as handed out.
        factors: which LoRA factors are trained; the other one stays as handed out.
        ranks: int64 [participants], LoRA rank of each, full when None; higher ranks of what is handed out are cut off.
            The scale of the adapter's product does not depend on it.
        terms: what the method adds to the local loss.
        exits: ascending blocks after which a classifier of its own sits. A participant trains those whose block it
            holds, so it must hold all blocks up to an exit, or none beyond. Empty: one classifier after the last block.
        distillation: weight of the mutual distillation between a participant's exits.
        hand_out: lets clients keep part of their adapters to themselves.
    """

    held: Allocation
    trained: Allocation | None = None
    factors: Factor = "both"
    ranks: NDArray[np.int64] | None = None
    terms: tuple[LocalTerm, ...] = ()
    exits: tuple[int, ...] = ()
    distillation: float = 0.0
    hand_out: HandOut | None = None

    def __post_init__(self) -> None:
        """Raises ValueError when a participant holds blocks but reaches no exit."""
        if self.exits and not (self.has_exit.any(axis=1) | ~self.held.any(axis=1)).all():
            raise ValueError(f"exits: found a participant that holds blocks but none of {self.exits}, expected one")

    @property
    def trained_blocks(self) -> Allocation:
        """bool [participants, blocks], the blocks whose adapters each participant trains."""
        return self.held if self.trained is None else self.trained

    @property
    def reached(self) -> Allocation:
        """bool [participants, blocks], the held blocks that gradients reach: from the first trained one on."""
        return self.held & (self.trained_blocks.cumsum(axis=1) > 0)

    @cached_property
    def has_exit(self) -> NDArray[np.bool_]:
        """bool [participants, classifiers], those that each participant trains; one for all without early exits."""
        return self.held[:, list(self.exits)] if self.exits else np.ones((len(self.held), 1), dtype=np.bool_)

    def exits_of(self, row: int) -> NDArray[np.int64]:
        """Indices of the classifiers that the participant in `row` trains, ascending."""
        return np.flatnonzero(self.has_exit[row])

    def make_own(self, row: int, client: int, blocks: NDArray[np.int64], slots: Tensor, layout: AdapterLayout) -> None:
        """Make `slots` [blocks, slot size], filled from the global adapters, what the client in `row` starts with."""
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
        )
