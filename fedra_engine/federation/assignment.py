"""What a method asks of the participants of a round, and the terms that may be added to their local loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedra_engine.config import TrainingConfig
from fedra_engine.federation.allocation import Allocation
from fedra_engine.models.adapters import AdapterLayout, Factor

HandOut = Callable[[int, NDArray[np.int64], Tensor], None]
"""Called with a client, the blocks it holds and its slots [held, slot size], filled from the global adapters; may
overwrite them with what the client kept to itself."""


@dataclass(frozen=True)
class BankRows:
    """The parameters that clients in training have in a bank, as a `LocalTerm` sees them.

    Attributes:
        parameters, gradients: [bank rows, size]; a term adds to the gradients in place.
        starts: of the same shape, what each row was handed out as; None unless some term `needs_starts`.
        rows: int64 [n], the rows in training; what a term adds to others is not used.
    """

    parameters: Tensor
    gradients: Tensor
    starts: Tensor | None
    rows: Tensor

    @property
    def values(self) -> Tensor:
        """A copy of the parameters in training, [n, size]."""
        return self.parameters[self.rows]

    def add(self, gradients: Tensor) -> None:
        """Add `gradients` [n, size] to those of the parameters in training."""
        self.gradients.index_add_(0, self.rows, gradients)


@dataclass(frozen=True)
class ClientsInTraining:
    """What the sweep trains in a step: all clients at once, in banks.

    Attributes:
        adapters: slots of blocks, whose factors lie as in `layout`.
        heads: classifiers; of size 0 where none is trained.
        ranks: int64 [n], LoRA rank of the client of each of `adapters.rows`; beyond it, factors are zero.
        layout: of the adapters.
    """

    adapters: BankRows
    heads: BankRows
    ranks: Tensor
    layout: AdapterLayout


@dataclass(frozen=True)
class ClientAlone:
    """What the sequential executor trains: one client's own sub-model.

    Attributes:
        parameters: all that the client trains.
        starts: what each of them was handed out as.
        factors: A [rank, in] and B [out, rank] of each adapter that it holds.
    """

    parameters: Sequence[Tensor]
    starts: Sequence[Tensor]
    factors: Sequence[tuple[Tensor, Tensor]]


class LocalTerm(ABC):
    """A term of the local loss of every client, which is not reported as loss.

    It says the same twice: in gradients, for many clients at once, and as a loss, which the sequential executor
    differentiates.
    """

    needs_starts = False
    """Whether `BankRows.starts` must be kept, which takes as much memory as the parameters."""

    @abstractmethod
    def add_gradients(self, clients: ClientsInTraining) -> None:
        """Add the gradient of the term to those of all clients in training."""

    @abstractmethod
    def loss(self, client: ClientAlone) -> Tensor:
        """The term [] for one client, to be differentiated."""


@dataclass(frozen=True)
class ProximalTerm(LocalTerm):
    """μ/2 ‖w − w₀‖² over all that a client trains, w₀ as handed out (FedProx, arXiv 1812.06127, eq. 2)."""

    mu: float
    needs_starts = True

    def add_gradients(self, clients: ClientsInTraining) -> None:
        for bank in (clients.adapters, clients.heads):
            assert bank.starts is not None
            bank.gradients.add_(bank.parameters - bank.starts, alpha=self.mu)

    def loss(self, client: ClientAlone) -> Tensor:
        pairs = zip(client.parameters, client.starts, strict=True)
        return 0.5 * self.mu * torch.stack([((p - start) ** 2).sum() for p, start in pairs]).sum()


def training_terms(training: TrainingConfig) -> tuple[LocalTerm, ...]:
    """The local terms that the configuration gives every method."""
    return (ProximalTerm(training.proximal_mu),) if training.proximal_mu > 0 else ()


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
