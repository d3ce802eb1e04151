"""LoRA dropout whose mask is a function of (seed, round, client, step, block, target, row, column) alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from fedra_engine.execution.plan import SweepPlan
from fedra_kernels import Dropout, dropout_keys, dropout_mask, to_device
from fedra_kernels.dropout import splitmix


class DropoutKeys:
    """The mask keys of the clients in a pass, for every place that drops.

    Attributes:
        p: the probability that an entry is dropped.
    """

    def __init__(self, p: float, seed: int, round: int, clients: Sequence[int], steps: Sequence[int]) -> None:
        """`clients` and `steps` (the local step each is at) are those of the pass, in the order of its batch."""
        self.p = p
        self._keys = dropout_keys(seed, round, np.asarray(clients, np.int64), np.asarray(steps, np.int64))

    def at(self, blocks: int | NDArray[np.int64], targets: int | NDArray[np.int64]) -> NDArray[np.int64]:
        """int64 [*places, clients], the keys at each of these places; blocks and targets broadcast."""
        sites = np.asarray(dropout_keys(blocks, targets))
        mixed = splitmix((self._keys ^ sites[..., None]).astype(np.uint64))
        return (mixed >> np.uint64(1)).astype(np.int64)


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


def pass_dropout(keys: DropoutKeys, plan: SweepPlan, targets: int) -> dict[tuple[int, int], Dropout]:
    """The dropout at each block and target of a pass, for the clients that go through the block; in one copy.

    The clients of the `keys` are in the order of the plan's batch, and blocks have `targets` each.
    """
    held = {block: rows.clients for block, rows in enumerate(plan.blocks) if rows is not None}
    everywhere = keys.at(np.array(list(held), dtype=np.int64)[:, None], np.arange(targets))
    tables = [of_block[:, clients] for of_block, clients in zip(everywhere, held.values(), strict=True)]
    moved = dict(zip(held, to_device(tables, plan.heads.device), strict=True))
    return {(block, target): Dropout(keys.p, moved[block][target]) for block in moved for target in range(targets)}
