"""How a domain's training samples are divided among its clients."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedra_engine.errors import InputError
from fedra_engine.randomness import generator

MAX_DRAWS = 1000
"""Draws after which a split with `min_samples` for every client is taken to be out of reach."""


def dirichlet_partition(
    labels: NDArray[np.int64],
    domains: NDArray[np.int64],
    *,
    clients_per_domain: int,
    alpha: float,
    min_samples: int,
    seed: int,
) -> list[NDArray[np.int64]]:
    """Divide samples with skewed labels, the split of FedRA's experiments (arXiv 2311.11227, §4).

    Inside a domain, every class is divided among the clients in proportions drawn from a Dirichlet
    distribution; clients that already have their average share of the domain get nothing more. The draw is
    repeated until every client has `min_samples`.

    Args:
        labels: int64 [samples].
        domains: int64 [samples], in 0…D-1.
        clients_per_domain: C; client j of domain d is client d·C + j.
        alpha: concentration; smaller is more skewed.
        min_samples: fewest samples of a client.
        seed: of the experiment.

    Returns:
        The sample rows of every client in ascending order; each row belongs to exactly one client.

    Raises:
        InputError: `min_samples` cannot be had.
    """
    partition: list[NDArray[np.int64]] = []
    for domain in range(int(domains.max()) + 1):
        rows = np.flatnonzero(domains == domain)
        rng = generator(seed, purpose=f"partition of domain {domain}")
        by_class = [rng.permutation(rows[labels[rows] == label]) for label in np.unique(labels[rows])]
        sizes = np.array([len(members) for members in by_class], dtype=np.int64)
        counts = _draw_counts(sizes, clients_per_domain, alpha, min_samples, rng, domain)
        partition.extend(_deal(by_class, counts))
    return partition


def _draw_counts(
    sizes: NDArray[np.int64],
    clients: int,
    alpha: float,
    min_samples: int,
    rng: np.random.Generator,
    domain: int,
) -> NDArray[np.int64]:
    """How many samples of each class go to each client, int64 [classes, clients]; row sums are `sizes`."""
    total = int(sizes.sum())
    if total < clients * min_samples:
        raise InputError(
            f"data.min_samples: found {min_samples} with {clients} clients for the {total} training samples "
            f"of domain {domain}, expected at most {total // clients}"
        )
    for _ in range(MAX_DRAWS):
        counts = _draw_counts_once(sizes, clients, alpha, rng)
        if counts.sum(axis=0).min() >= min_samples:
            return counts
    raise InputError(
        f"data.min_samples: found {min_samples}, which none of {MAX_DRAWS} splits of domain {domain} gave "
        f"all of its {clients} clients; expected fewer, or a larger data.dirichlet_alpha than {alpha:g}"
    )


def _draw_counts_once(
    sizes: NDArray[np.int64], clients: int, alpha: float, rng: np.random.Generator
) -> NDArray[np.int64]:
    counts = np.zeros((len(sizes), clients), dtype=np.int64)
    held = np.zeros(clients, dtype=np.int64)
    average = sizes.sum() / clients
    for label, size in enumerate(sizes):
        is_open = held < average
        shares = rng.dirichlet(np.full(clients, alpha)) * is_open
        if shares.sum() == 0:
            # A small alpha can put all of the mass on clients that are full.
            shares = is_open.astype(np.float64)
        cuts = np.rint(np.cumsum(shares) / shares.sum() * size).astype(np.int64)
        counts[label] = np.diff(cuts, prepend=0)
        held += counts[label]
    return counts


def _deal(by_class: list[NDArray[np.int64]], counts: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Give each client its counted samples [classes, clients] of every class."""
    rows = np.concatenate(by_class)
    owners = np.concatenate([np.repeat(np.arange(counts.shape[1]), row) for row in counts])
    order = np.lexsort((rows, owners))
    return np.split(rows[order], np.cumsum(counts.sum(axis=0))[:-1])
