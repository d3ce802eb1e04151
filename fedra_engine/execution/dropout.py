"""LoRA dropout, whose masks depend only on (seed, round, client, step, block, target, row, column)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedra_engine.data.cache import copy_async
from fedra_engine.execution.plan import SweepPlan
from fedra_kernels import Dropout, dropout_keys, dropout_mask
from fedra_kernels.dropout import splitmix

Ints = Sequence[int] | NDArray[np.int64]


class DropoutKeys:
    """The dropout keys of the clients in a pass.

    Attributes:
        p: the probability that an entry is dropped.
    """

    def __init__(self, p: float, seed: int, round: int, clients: Ints, steps: Ints) -> None:
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


class PassDropout:
    """The dropout of a pass over a plan, whose keys change from step to step at one address.

    Attributes:
        of: the dropout by (block, target), for the clients that hold the block.
    """

    def __init__(self, p: float, plan: SweepPlan, targets: int) -> None:
        """Drop with probability `p`; a block has `targets` targets. The keys are not set yet."""
        held = {block: rows.clients for block, rows in enumerate(plan.blocks) if rows is not None}
        self._blocks, self._targets = np.array(list(held), dtype=np.int64)[:, None], np.arange(targets)
        groups = len(plan.heads)
        starts = np.arange(len(held) * targets).reshape(-1, targets, 1) * groups
        # Of all groups' keys at all targets of the held blocks, those of groups that hold them.
        each = [(start + clients).reshape(-1) for start, clients in zip(starts, held.values(), strict=True)]
        self._used = np.concatenate([np.empty(0, dtype=np.int64), *each])
        self._keys = torch.zeros(len(self._used), dtype=torch.int64, device=plan.heads.device)
        sites = [(block, target) for block in held for target in range(targets)]
        parts = self._keys.split([len(held[block]) for block, _ in sites])
        self.of = {site: Dropout(p, part) for site, part in zip(sites, parts, strict=True)}

    def set_keys(self, keys: DropoutKeys) -> None:
        """Take the keys of a step, of all groups of the plan, in one copy to the device."""
        used = keys.at(self._blocks, self._targets).reshape(-1)[self._used]
        self._keys.copy_(copy_async(torch.from_numpy(used), self._keys.device))
