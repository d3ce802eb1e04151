"""Aggregation over clients of several LoRA ranks: each rank is averaged over the clients that have it."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedra_engine.federation.aggregation import Aggregator
from fedra_engine.federation.work import ClientUpdates
from fedra_engine.models.adapters import AdapterLayout
from fedra_engine.models.state import GlobalState
from fedra_kernels import to_device


class RankedAggregator(Aggregator):
    """Treats ranks as FedRA treats blocks: a mean over those that hold them, and the old value where nobody does.

    A client of lower rank returns zeros in the others. Counted as values, they would shrink what clients of full rank
    have learnt in every round.
    """

    def __init__(
        self,
        previous: GlobalState,
        layout: AdapterLayout,
        ranks: NDArray[np.int64],
        *,
        weighting: Literal["uniform", "samples"],
        deterministic: bool,
    ) -> None:
        """`ranks` [clients] are those of all clients."""
        super().__init__(previous, weighting=weighting, deterministic=deterministic)
        self._layout = layout
        self._ranks = ranks
        self._by_rank = self._adapters.weight.new_zeros(len(previous.adapters), layout.rank)
        """Sum of the weights of the clients that have each rank of each block, [blocks, rank]."""

    def add(self, updates: ClientUpdates) -> None:
        """See `Aggregator.add`."""
        super().add(updates)
        has = np.arange(self._layout.rank) < self._ranks[updates.clients][updates.slot_owners, None]
        blocks, has_rank = to_device([updates.slot_blocks, has], self._by_rank.device)
        self._by_rank.index_add_(0, blocks, self.slot_weights(updates)[:, None] * has_rank)

    def sums(self) -> list[Tensor]:
        """See `Aggregator.sums`."""
        return [*super().sums(), self._by_rank]

    def trained(self) -> Tensor:
        """See `Aggregator.trained`; a rank is trained by those that have it."""
        return self._layout.per_rank(self._by_rank) > 0

    def result(self) -> GlobalState:
        """See `Aggregator.result`."""
        state, previous = super().result(), self.previous.adapters
        held = self._adapters.weight
        share = self._by_rank / torch.where(held > 0, held, torch.ones_like(held))[:, None]
        shares = self._layout.per_rank(share.to(previous))
        adapters = torch.where(shares > 0, state.adapters / torch.where(shares > 0, shares, 1), previous)
        return replace(state, adapters=adapters)
