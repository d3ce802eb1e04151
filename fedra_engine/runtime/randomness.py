"""Random draws, each determined by (seed, round, client, purpose) alone.

So no draw depends on how clients are batched, on the number of processes, or on earlier draws.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

SERVER = -1
"""The `client` of the server's draws, such as sampling, allocation and initial adapters."""


def generator(seed: int, *, round: int = 0, client: int = SERVER, purpose: str) -> np.random.Generator:
    """A NumPy generator for one purpose; equal arguments give equal streams on every platform.

    Philox is counter-based: distinct 128-bit keys are independent streams, so a digest of the arguments is
    a sound key.
    """
    text = f"{seed}/{round}/{client}/{purpose}".encode()
    return np.random.Generator(np.random.Philox(_Digest(hashlib.blake2b(text, digest_size=16).digest())))


@dataclass(frozen=True)
class SampleDraws:
    """Random draws for the samples of a batch that several clients may share.

    A sample's draws depend only on the seed, the round, the client, its local step, and the sample's position among
    those of the client.

    Attributes:
        seed, round: of the experiment.
        clients: client of each group of samples, in the order of the batch.
        steps: local step of each group.
        sizes: samples of each group.
    """

    seed: int
    round: int
    clients: Sequence[int]
    steps: Sequence[int]
    sizes: Sequence[int]

    def uniform(self, count: int) -> NDArray[np.float64]:
        """Uniform draws from [0, 1), [samples, count]."""
        groups = zip(self.clients, self.steps, self.sizes, strict=True)
        return np.concatenate(
            [
                generator(self.seed, round=self.round, client=client, purpose=f"samples of step {step}").random(
                    (size, count)
                )
                for client, step, size in groups
            ]
        )


class _Digest(np.random.SeedSequence):
    """Makes a digest the key of Philox; `Philox(key=…)` does the same, but asks the system for entropy first."""

    def __init__(self, digest: bytes) -> None:
        self._words = np.frombuffer(digest, dtype="<u8").astype(np.uint64)

    def generate_state(self, n_words: int, dtype: Any = np.uint64) -> NDArray[np.uint64]:
        return self._words[:n_words]
