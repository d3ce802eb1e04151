"""LoRA factors that never leave their client: kept while it waits, handed back when it is sampled again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedra_engine.federation.work import ClientUpdates
from fedra_engine.models.state import GlobalState
from fedra_engine.runtime.processes import Processes


class PrivateFactors:
    """Some columns of each client's slots, on the host; memory grows with the clients that ever took part."""

    def __init__(self, columns: slice, depth: int) -> None:
        """`columns` of a slot are private; the model has `depth` blocks."""
        self._columns = columns
        self._depth = depth
        self._kept: dict[int, dict[int, Tensor]] = {}
        self._new: dict[int, tuple[list[int], Tensor]] = {}
        """Blocks and values of each client seen since the last synchronization."""

    def keep(self, updates: ClientUpdates) -> None:
        """Remember what a few clients trained."""
        for _, client, update in updates.of_good_clients():
            values = update.adapters[:, self._columns].cpu().clone()
            self._new[client] = (update.blocks.tolist(), values)
            self._remember(client, *self._new[client])

    def synchronize(self, processes: Processes) -> None:
        """Let every process have what any of them kept: a client may next be trained by another one."""
        for kept in processes.all_gather_object(self._new):
            for client, (blocks, values) in kept.items():
                self._remember(client, blocks, values)
        self._new = {}

    def hand_out(self, client: int, blocks: NDArray[np.int64], slots: Tensor) -> None:
        """Put what `client` kept for `blocks` into its slots [blocks, slot size]; see `assignment.HandOut`."""
        kept = self._kept.get(client, {})
        for row, block in enumerate(blocks.tolist()):
            if block in kept:
                slots[row, self._columns] = kept[block].to(slots)

    def personal_state(self, client: int, state: GlobalState) -> GlobalState:
        """The model of `client`: the global state with what it kept."""
        adapters = state.adapters.clone()
        self.hand_out(client, np.arange(self._depth), adapters)
        return replace(state, adapters=adapters)

    def tensors(self) -> dict[str, Tensor]:
        """Everything kept, for a checkpoint."""
        named = {}
        for client, kept in self._kept.items():
            named[f"blocks.{client}"] = torch.tensor(list(kept))
            named[f"factors.{client}"] = torch.stack(list(kept.values()))
        return named

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `tensors` gave."""
        for name, blocks in tensors.items():
            kind, _, client = name.partition(".")
            if kind == "blocks":
                self._remember(int(client), blocks.tolist(), tensors[f"factors.{client}"])

    def _remember(self, client: int, blocks: list[int], values: Tensor) -> None:
        # Of their own: a row would keep the memory of all blocks it came with.
        rows = [row.clone() for row in values]
        self._kept.setdefault(client, {}).update(zip(blocks, rows, strict=True))
