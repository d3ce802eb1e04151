"""LoRA dropout, whose masks depend only on (seed, round, client, step, block, target, row, column)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from fedra_engine.execution.plan import SweepPlan
from fedra_kernels import Dropout, dropout_keys, dropout_mask, to_device
from fedra_kernels.dropout import splitmix


class DropoutKeys:
    """The dropout keys of the clients in a pass.

    Attributes:
        p: the probability that an entry is dropped.
    """

    def __init__(self, p: float, seed: int, round: int, clients: Sequence[int], steps: Sequence[int]) -> None:
        """`clients` are in the order of the batch, `steps` their local steps."""
        self.p = p
        self._keys = dropout_keys(seed, round, np.asarray(clients, np.int64), np.asarray(steps, np.int64))

    def at(self, blocks: int | NDArray[np.int64], targets: int | NDArray[np.int64]) -> NDArray[np.int64]:
        """The keys at each block and target, which broadcast; int64 [*broadcast shape, clients]."""
        sites = np.asarray(dropout_keys(blocks, targets))
        mixed = splitmix((self._keys ^ sites[..., None]).astype(np.uint64))
        return (mixed >> np.uint64(1)).astype(np.int64)


class CounterDropout(nn.Module):
    """One client's dropout of one target, with the masks of the sweep in place of PEFT's."""

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
    """The dropout of each (block, target) for the clients that hold the block, moved to the device in one copy.

    `keys` are those of the clients of `plan`, in the order of the batch; a block has `targets` targets.
    """
    held = {block: rows.clients for block, rows in enumerate(plan.blocks) if rows is not None}
    everywhere = keys.at(np.array(list(held), dtype=np.int64)[:, None], np.arange(targets))
    tables = [of_block[:, clients] for of_block, clients in zip(everywhere, held.values(), strict=True)]
    moved = dict(zip(held, to_device(tables, plan.heads.device), strict=True))
    return {(block, target): Dropout(keys.p, moved[block][target]) for block in moved for target in range(targets)}
