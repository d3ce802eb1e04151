"""LoRA dropout whose mask is a function of (seed, round, client, step, block, target, row, column) alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedra_engine.execution.plan import SweepPlan
from fedra_kernels import Dropout, dropout_keys, dropout_mask, to_device

_EVEN = 2
"""Keys of 8 bytes begin at multiples of 16: kernels are compiled anew for pointers that are aligned otherwise."""


class DropoutKeys:
    """The mask keys of the clients in a pass, for every place that drops.

    Attributes:
        p: the probability that an entry is dropped.
    """

    def __init__(self, p: float, *, seed: int, round: int, clients: Sequence[int], steps: Sequence[int]) -> None:
        """`clients` and `steps` (the local step each is at) are those of the pass, in the order of its batch."""
        self.p = p
        self._keys = dropout_keys(seed, round, np.asarray(clients, np.int64), np.asarray(steps, np.int64))

    def at(self, blocks: int | NDArray[np.int64], targets: int | NDArray[np.int64]) -> NDArray[np.int64]:
        """int64 [*places, clients], the keys at each of these places; blocks and targets broadcast."""
        sites = np.asarray(dropout_keys(blocks, targets))
        return _mix(self._keys ^ sites[..., None])


class PassDropout:
    """The dropout of every target in every block of a pass, on the device."""

    def __init__(self, keys: DropoutKeys, plan: SweepPlan, targets: int, device: torch.device) -> None:
        """Copy all keys at once; their clients are in the order of the plan's batch, and blocks have `targets` each."""
        held = [block for block, rows in enumerate(plan.blocks) if rows is not None]
        everywhere = keys.at(np.array(held, dtype=np.int64)[:, None], np.arange(targets))
        tables = []
        for block, of_all in zip(held, everywhere, strict=True):
            rows = plan.blocks[block]
            assert rows is not None
            of_holders = of_all[:, rows.clients]
            tables.append(np.pad(of_holders, ((0, 0), (0, len(rows.clients) % _EVEN))))
        self._p = keys.p
        self._plan = plan
        self._tables = dict(zip(held, to_device(tables, device), strict=True))

    def at(self, block: int, target: int) -> Dropout:
        """The dropout of one target of one block, for the clients that go through the block."""
        rows = self._plan.blocks[block]
        assert rows is not None
        return Dropout(self._p, self._tables[block][target, : len(rows.clients)])


class CounterDropout(nn.Module):
    """One client's dropout of one target, in place of PEFT's: the same masks as the sweep draws."""

    def __init__(self, block: int, target: int) -> None:
        super().__init__()
        self._block = block
        self._target = target
        self.keys: DropoutKeys

    def forward(self, x: Tensor) -> Tensor:
        (key,) = self.keys.at(self._block, self._target).tolist()
        rows = x.numel() // x.shape[-1]
        mask = dropout_mask(key, rows, x.shape[-1], self.keys.p, dtype=x.dtype, device=x.device)
        return x * mask.view_as(x)


def _mix(keys: NDArray[np.int64]) -> NDArray[np.int64]:
    """The splitmix64 finalizer (wrapping arithmetic), without the sign bit."""
    mixed = keys.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((mixed ^ (mixed >> np.uint64(31))) >> np.uint64(1)).astype(np.int64)
