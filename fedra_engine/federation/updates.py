"""What trained clients return: their updates, as rows of an executor's banks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedra_engine.federation.work import LocalWork
from fedra_engine.runtime.errors import count_of, first_few
from fedra_kernels import squared_changes, to_device

_MOST_NAMED = 10
"""Clients that the representation of updates names."""


class ClientUpdate(NamedTuple):
    """One client's update: `adapters` [blocks, slot size] of `blocks` and `heads` [exits, head size] of `exits`."""

    blocks: NDArray[np.int64]
    adapters: Tensor
    exits: NDArray[np.int64]
    heads: Tensor

    def __repr__(self) -> str:
        return f"ClientUpdate({count_of(len(self.blocks), 'block')}, {count_of(len(self.exits), 'classifier')})"


@dataclass(frozen=True)
class ClientUpdates:
    """The updates of a few clients, as rows of the executor's banks.

    The banks are reused: the tensors hold these values only until the next updates are asked for.

    Attributes:
        clients: int64 [clients].
        samples: int64 [clients], number of training samples of each client.
        processed: int64 [clients], samples that each client trained on, over all local steps.
        losses: float64 [clients] on the executor's device, training loss summed over these samples.
        adapters: [bank rows, slot size], the adapter bank.
        slots: int64 [slots], rows of `adapters` that these clients trained.
        slot_owners, slot_blocks: int64 [slots], each slot's index into `clients`, and its block.
        heads: [bank rows, head size], the head bank.
        head_rows: int64 [heads], rows of `heads` that these clients trained.
        head_owners, head_exits: int64 [heads], each head's index into `clients`, and its global classifier.
        norms: float64 [clients] on the executor's device, norm of each client's change; not finite for a bad update,
            whose loss or parameters are not finite. None before `checked`.
    """

    clients: NDArray[np.int64]
    samples: NDArray[np.int64]
    processed: NDArray[np.int64]
    losses: Tensor
    adapters: Tensor
    slots: Tensor
    slot_owners: NDArray[np.int64]
    slot_blocks: NDArray[np.int64]
    heads: Tensor
    head_rows: Tensor
    head_owners: NDArray[np.int64]
    head_exits: NDArray[np.int64]
    norms: Tensor | None = None

    def __repr__(self) -> str:
        return f"ClientUpdates(of {'client' if len(self.clients) == 1 else 'clients'} {self._names()})"

    def _names(self) -> str:
        return first_few([str(client) for client in self.clients], _MOST_NAMED)

    @classmethod
    def of_one(cls, client: int, update: ClientUpdate, work: LocalWork, loss: float, processed: int) -> ClientUpdates:
        """The updates of one client; `loss` is summed over the `processed` samples."""
        clients, (blocks, adapters, exits, heads) = np.array([client]), update
        return cls(
            clients=clients,
            samples=work.clients.sample_counts(clients),
            processed=np.array([processed]),
            losses=torch.tensor([loss], dtype=torch.float64),
            adapters=adapters,
            slots=torch.arange(len(blocks), device=adapters.device),
            slot_owners=np.zeros(len(blocks), dtype=np.int64),
            slot_blocks=blocks,
            heads=heads,
            head_rows=torch.arange(len(exits), device=heads.device),
            head_owners=np.zeros(len(exits), dtype=np.int64),
            head_exits=exits,
        )

    def checked(
        self, starts: Tensor, head_starts: Tensor, *, rows: Tensor | None = None, head_rows: Tensor | None = None
    ) -> ClientUpdates:
        """Add `norms`, and set bad updates to zero in place, without waiting for the device.

        A weight of zero would not be enough to leave them out: NaN × 0 is NaN.

        Args:
            starts, rows: [slots, slot size], the slots before local training; or the rows of `starts`, int64 [slots].
            head_starts, head_rows: the same for the heads, [heads, head size].
        """
        device = self.adapters.device
        owners, head_owners = to_device([self.slot_owners, self.head_owners], device)
        losses = self.losses.to(device)
        squares = torch.zeros_like(losses)
        trained = (
            (self.adapters, self.slots, owners, starts, rows),
            (self.heads, self.head_rows, head_owners, head_starts, head_rows),
        )
        for bank, after, of_bank, before, before_rows in trained:
            squares.index_add_(0, of_bank, squared_changes(bank, after, before, before_rows))
        norms = squares.sqrt().where(losses.isfinite(), torch.nan)
        good = norms.isfinite()
        for bank, after, of_bank, *_ in trained:
            kept = good.index_select(0, of_bank)
            if device.type == "cpu":
                bank[after[~kept]] = 0
            else:
                # Indexing by a mask would wait for the device.
                bank.index_copy_(0, after, bank.index_select(0, after).where(kept[:, None], 0))
        return replace(self, losses=losses.where(good, 0), norms=norms)

    @property
    def good(self) -> Tensor:
        """bool [clients] on the executor's device, whether the client's update is finite."""
        assert self.norms is not None
        return self.norms.isfinite()

    def of_good_clients(self) -> Iterator[tuple[int, int, ClientUpdate]]:
        """Yield position, client and update of each client whose update is finite; waits for the device."""
        for position in torch.nonzero(self.good)[:, 0].tolist():
            yield position, int(self.clients[position]), self.of_client(position)

    def of_client(self, position: int) -> ClientUpdate:
        """The update of `clients[position]`."""
        mine, my_heads = self.slot_owners == position, self.head_owners == position
        slots = self.slots[torch.from_numpy(mine).to(self.slots.device)]
        rows = self.head_rows[torch.from_numpy(my_heads).to(self.head_rows.device)]
        return ClientUpdate(self.slot_blocks[mine], self.adapters[slots], self.head_exits[my_heads], self.heads[rows])
