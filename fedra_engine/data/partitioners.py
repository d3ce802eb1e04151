"""How the samples of a pool are divided among clients: the partitions of the literature.

Each partitioner takes the pool's labels and gives each client the positions in the pool that it gets. Each position
goes to exactly one client. Partitioners whose sizes are random draw again until every client has the minimum.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedra_engine.runtime.errors import InputError

MAX_DRAWS = 1000
"""Draws after which a split with the minimum for every client is taken to be out of reach."""

Positions = NDArray[np.int64]


@dataclass(frozen=True)
class Pool:
    """Samples to divide.

    Attributes:
        labels: int64 [samples].
        clients: among how many clients.
        min_samples: fewest samples of a client.
        name: which samples these are, for people.
        rng: all draws come from it.
    """

    labels: NDArray[np.int64]
    clients: int
    min_samples: int
    name: str
    rng: np.random.Generator


class Partitioner(Protocol):
    """Divides a pool; returns the positions of every client, in any order."""

    def __call__(self, pool: Pool) -> list[Positions]:
        """
        Raises:
            InputError: the minimum cannot be had.
        """
        ...


def check_pool(pool: Pool) -> None:
    """Raise InputError when there are too few samples for the minimum, however they are divided."""
    total = len(pool.labels)
    if total < pool.clients * pool.min_samples:
        raise InputError(
            f"data.min_samples: found {pool.min_samples} with {pool.clients} clients for the {total} training samples "
            f"of {pool.name}, expected at most {total // pool.clients}, or fewer clients (data.clients_per_domain, "
            "data.clients or data.partition domain)"
        )


def iid(pool: Pool) -> list[Positions]:
    """Every client gets as many samples, drawn uniformly; sizes differ by one at most."""
    return np.array_split(pool.rng.permutation(len(pool.labels)), pool.clients)


@dataclass(frozen=True)
class Dirichlet:
    """Label skew: every class is divided in proportions drawn from a Dirichlet distribution (arXiv 1909.06335).

    With `balanced`, clients that already have their average share get nothing more: the split of FedRA's experiments
    (arXiv 2311.11227, §4).

    Attributes:
        alpha: concentration; smaller is more skewed.
        balanced: see above.
    """

    alpha: float
    balanced: bool

    def __call__(self, pool: Pool) -> list[Positions]:
        """See `Partitioner`."""
        by_class = [pool.rng.permutation(np.flatnonzero(pool.labels == label)) for label in np.unique(pool.labels)]
        sizes = np.array([len(members) for members in by_class], dtype=np.int64)
        counts = _draw_until_minimum(
            pool, lambda: self._draw(sizes, pool), hint=f"a larger data.dirichlet_alpha than {self.alpha:g}"
        )
        owners = np.concatenate([np.repeat(np.arange(pool.clients), row) for row in counts])
        positions = np.concatenate(by_class)
        return [positions[owners == client] for client in range(pool.clients)]

    def _draw(self, sizes: NDArray[np.int64], pool: Pool) -> NDArray[np.int64]:
        """How many samples of each class go to each client, int64 [classes, clients]; row sums are `sizes`."""
        counts = np.zeros((len(sizes), pool.clients), dtype=np.int64)
        held = np.zeros(pool.clients, dtype=np.int64)
        average = sizes.sum() / pool.clients
        for label, size in enumerate(sizes):
            is_open = held < average if self.balanced else np.ones(pool.clients, dtype=np.bool_)
            shares = pool.rng.dirichlet(np.full(pool.clients, self.alpha)) * is_open
            if shares.sum() == 0:
                # A small alpha can put all of the mass on clients that are full.
                shares = is_open.astype(np.float64)
            cuts = np.rint(np.cumsum(shares) / shares.sum() * size).astype(np.int64)
            counts[label] = np.diff(cuts, prepend=0)
            held += counts[label]
        return counts


@dataclass(frozen=True)
class Shards:
    """Pathological label skew (arXiv 1602.05629): samples sorted by label, cut into equal shards, some for each client.

    Attributes:
        per_client: shards of a client; most have one label only.
    """

    per_client: int

    def __call__(self, pool: Pool) -> list[Positions]:
        """See `Partitioner`."""
        order = pool.rng.permutation(len(pool.labels))
        order = order[np.argsort(pool.labels[order], kind="stable")]
        shards = np.array_split(order, pool.clients * self.per_client)
        sizes = np.array([len(shard) for shard in shards])

        def draw() -> NDArray[np.int64]:
            return pool.rng.permutation(len(shards)).reshape(self.per_client, pool.clients)

        dealt = _draw_until_minimum(pool, draw, hint="fewer data.shards_per_client", size=lambda deal: sizes[deal])
        return [np.concatenate([shards[shard] for shard in hand]) for hand in dealt.T]


@dataclass(frozen=True)
class Quantity:
    """Quantity skew: sample counts in proportion to draws of a log-normal distribution; labels are IID.

    Attributes:
        sigma: standard deviation of the logarithm of the counts; 0 gives all clients as many.
    """

    sigma: float

    def __call__(self, pool: Pool) -> list[Positions]:
        """See `Partitioner`."""
        counts = _draw_until_minimum(
            pool, lambda: self._draw(pool)[None], hint=f"a smaller data.quantity_sigma than {self.sigma:g}"
        )[0]
        return np.split(pool.rng.permutation(len(pool.labels)), np.cumsum(counts)[:-1])

    def _draw(self, pool: Pool) -> NDArray[np.int64]:
        """Samples of each client, int64 [clients]."""
        exponents = (self.sigma * pool.rng.standard_normal(pool.clients)).tolist()
        largest = max(exponents)
        # Rounded, so that the last bit of a platform's exponential does not move a sample.
        weights = np.array([round(math.exp(exponent - largest), 9) for exponent in exponents])
        cuts = np.rint(np.cumsum(weights) / weights.sum() * len(pool.labels)).astype(np.int64)
        return np.diff(cuts, prepend=0)


def _draw_until_minimum(
    pool: Pool,
    draw: Callable[[], NDArray[np.int64]],
    *,
    hint: str,
    size: Callable[[NDArray[np.int64]], NDArray[np.int64]] = lambda counts: counts,
) -> NDArray[np.int64]:
    """The first draw [parts, clients] whose sizes, summed over parts, give every client the minimum."""
    for _ in range(MAX_DRAWS):
        drawn = draw()
        if size(drawn).sum(axis=0).min() >= pool.min_samples:
            return drawn
    raise InputError(
        f"data.min_samples: found {pool.min_samples}, which none of {MAX_DRAWS} splits of {pool.name} gave all of its "
        f"{pool.clients} clients; expected fewer, or {hint}"
    )
