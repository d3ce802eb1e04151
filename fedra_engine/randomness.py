"""Every random draw of the engine comes from (seed, round, client, purpose) and from nothing else.

So no draw depends on how clients are batched, on the number of processes, or on what ran before.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

SERVER = -1
"""The `client` of draws that belong to nobody in particular: sampling, allocation, initial adapters."""


def generator(seed: int, *, round: int = 0, client: int = SERVER, purpose: str) -> np.random.Generator:
    """A NumPy generator for one purpose; equal arguments give equal streams on every platform.

    Philox is counter-based: distinct 128-bit keys are independent streams, so a digest of the arguments is
    a sound key.
    """
    text = f"{seed}/{round}/{client}/{purpose}".encode()
    return np.random.Generator(np.random.Philox(_Digest(hashlib.blake2b(text, digest_size=16).digest())))


class _Digest(np.random.SeedSequence):
    """Hands a digest to Philox as its key; `Philox(key=…)` does the same but asks the system for entropy first."""

    def __init__(self, digest: bytes) -> None:
        self._words = np.frombuffer(digest, dtype="<u8").astype(np.uint64)

    def generate_state(self, n_words: int, dtype: Any = np.uint64) -> NDArray[np.uint64]:
        return self._words[:n_words]
