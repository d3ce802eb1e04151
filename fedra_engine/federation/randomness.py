"""Every random draw of the engine comes from (seed, round, client, purpose) and from nothing else.

So no draw depends on how clients are batched, on the number of processes, or on what ran before.
"""

from __future__ import annotations

import hashlib

import numpy as np

SERVER = -1
"""The `client` of draws that belong to nobody in particular: sampling, allocation, initial adapters."""


def generator(seed: int, *, round: int = 0, client: int = SERVER, purpose: str) -> np.random.Generator:
    """A NumPy generator for one purpose; equal arguments give equal streams on every platform.

    Philox is counter-based: distinct 128-bit keys are independent streams, so a digest of the arguments is
    a sound key.
    """
    text = f"{seed}/{round}/{client}/{purpose}".encode()
    digest = hashlib.blake2b(text, digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
