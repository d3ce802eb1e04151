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
    """A bank as a `LocalTerm` sees it.

    Attributes:
        parameters, gradients: [bank rows, size]; a term adds to the gradients in place.
        starts: [bank rows, size], the parameters before local training; None unless a term `needs_starts`.
        rows: int64 [n], the rows in training; gradients of other rows are ignored.
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
        """Add `gradients` [n, size] to the gradients of the rows in training."""
        self.gradients.index_add_(0, self.rows, gradients)


@dataclass(frozen=True)
class ClientsInTraining:
    """All clients that the sweep trains in a step.

    Attributes:
        adapters: the adapter bank; `layout` says where the factors lie.
        heads: the head bank; of size 0 where no classifier is trained.
        ranks: int64 [n], LoRA rank of each of `adapters.rows`; factors are zero beyond it.
    """

    adapters: BankRows
    heads: BankRows
    ranks: Tensor
    layout: AdapterLayout


@dataclass(frozen=True)
class ClientAlone:
    """The client that the sequential executor trains.

    Attributes:
        parameters: its trainable parameters.
        starts: the parameters before local training.
        factors: A [rank, in] and B [out, rank] of each of its adapters, trained or not.
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
    """μ/2 ‖w − w₀‖² over a client's trainable parameters, w₀ being their start (FedProx, arXiv 1812.06127, eq. 2)."""

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
    """The local terms that the configuration adds to every method."""
    return (ProximalTerm(training.proximal_mu),) if training.proximal_mu > 0 else ()
