"""Terms that are added to the clients' local loss, by a method or by the configuration."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedra_engine.config import TrainingConfig
from fedra_engine.models.adapters import AdapterLayout


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
    """A term that is added to the local loss of every client; reported losses leave it out.

    It is written twice: as gradients, for all clients in training at once, and as a loss, which the sequential
    executor differentiates.
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
