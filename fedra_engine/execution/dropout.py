"""LoRA dropout whose mask is a function of (seed, round, client, step, block, target, row, column) alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fedra_kernels import Dropout, dropout_key, dropout_mask

_GOLDEN = 0x9E3779B97F4A7C15


class DropoutKeys:
    """The mask keys of the clients in a pass, for every place that drops."""

    def __init__(
        self,
        p: float,
        *,
        seed: int,
        round: int,
        clients: Sequence[int],
        steps: Sequence[int],
        device: torch.device | None = None,
    ) -> None:
        """`clients` and `steps` (the local step each is at) are those of the pass, in the order of its batch."""
        self._p = p
        keys = [dropout_key(seed, round, client, step) for client, step in zip(clients, steps, strict=True)]
        self._keys = torch.tensor(keys, dtype=torch.int64, device=device)

    def at(self, block: int, target: int, clients: Tensor | slice) -> Dropout:
        """The dropout of one target of one block for the clients at these positions of the pass, int64 [groups]."""
        site = dropout_key(block, target)
        return Dropout(self._p, _mix(self._keys[clients] ^ site))


class CounterDropout(nn.Module):
    """One client's dropout of one target, in place of PEFT's: the same masks as the sweep draws."""

    def __init__(self, block: int, target: int) -> None:
        super().__init__()
        self._block = block
        self._target = target
        self.keys: DropoutKeys

    def forward(self, x: Tensor) -> Tensor:
        dropout = self.keys.at(self._block, self._target, slice(None))
        rows = x.numel() // x.shape[-1]
        mask = dropout_mask(int(dropout.keys[0]), rows, x.shape[-1], dropout.p, dtype=x.dtype, device=x.device)
        return x * mask.view_as(x)


def _mix(keys: Tensor) -> Tensor:
    """The splitmix64 finalizer on int64 tensors (wrapping arithmetic), without the sign bit."""
    keys = keys + _signed(_GOLDEN)
    keys = (keys ^ _shift(keys, 30)) * _signed(0xBF58476D1CE4E5B9)
    keys = (keys ^ _shift(keys, 27)) * _signed(0x94D049BB133111EB)
    return _shift(keys ^ _shift(keys, 31), 1)


def _shift(keys: Tensor, bits: int) -> Tensor:
    """A logical shift to the right; torch's is arithmetic, so the sign bits are masked."""
    return (keys >> bits) & ((1 << (64 - bits)) - 1)


def _signed(constant: int) -> int:
    return constant - (1 << 64) if constant >= 1 << 63 else constant
