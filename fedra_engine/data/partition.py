"""Which training samples each client has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from numpy.typing import NDArray

from fedra_engine.config import DataConfig
from fedra_engine.data.domain_data import DomainData
from fedra_engine.data.partitioners import Dirichlet, Partitioner, Pool, Quantity, Shards, check_pool, iid
from fedra_engine.runtime.errors import InputError
from fedra_engine.runtime.randomness import generator

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Partition:
    """The division of training samples among clients.

    Attributes:
        samples: rows of each client, ascending.
        domains: int64 [clients], each client's domain; if it has several, that of most of its samples.
        by_domain: whether clients come domain after domain, as many for each.
        sizes: int64 [clients], how many samples each has, where counting them would take drawing them.
    """

    samples: Sequence[Rows]
    domains: NDArray[np.int64]
    by_domain: bool
    sizes: NDArray[np.int64] | None = None

    def groups(self, count: int) -> NDArray[np.int64]:
        """Which of `count` settings each client has: its domain's, or dealt in turn when clients mix domains."""
        return self.domains if self.by_domain else np.arange(len(self.samples)) % max(count, 1)


def partition_samples(config: DataConfig, train: DomainData, seed: int) -> Partition:
    """Divide the training samples by `config.partition`; every sample goes to exactly one client.

    (Not so under `bootstrap`, where clients draw with replacement, each from one domain.)

    Raises:
        InputError: what the partition goes by is not known of these samples, or a client has too few of them.
    """
    if config.partition == "natural":
        return _natural(config, train)
    if config.partition == "bootstrap":
        return _bootstrap(config, train, seed)
    if config.clients is not None:
        samples = _divide(config, train, np.arange(len(train)), config.clients, "the data", seed, "partition")
        return Partition(samples, _main_domains(samples, train), by_domain=False)
    clients = 1 if config.partition == "domain" else config.clients_per_domain
    domain_of_client = np.repeat(np.arange(len(train.domains)), clients)
    pools = [np.flatnonzero(train.domain_of == domain) for domain in range(len(train.domains))]
    samples = [
        rows
        for domain, pool in enumerate(pools)
        for rows in _divide(
            config,
            train,
            pool,
            clients,
            f"domain {train.domains[domain]!r}",
            seed,
            f"partition of domain {domain}",
        )
    ]
    return Partition(samples, domain_of_client, by_domain=True)


class BootstrapSamples(Sequence[Rows]):
    """Samples of any number of clients, drawn with replacement when they are asked for and never stored."""

    def __init__(self, pools: Sequence[Rows], domains: NDArray[np.int64], count: int, seed: int) -> None:
        """
        Args:
            pools: rows of each domain.
            domains: int64 [clients], the domain that each client draws from.
            count: samples of each client.
            seed: of the experiment.
        """
        self._pools = pools
        self._domains = domains
        self._count = count
        self._seed = seed

    def __len__(self) -> int:
        return len(self._domains)

    @overload
    def __getitem__(self, client: int) -> Rows: ...
    @overload
    def __getitem__(self, client: slice) -> list[Rows]: ...
    def __getitem__(self, client: int | slice) -> Rows | list[Rows]:
        if isinstance(client, slice):
            return [self[index] for index in range(*client.indices(len(self)))]
        if not 0 <= client < len(self):
            raise IndexError(client)
        pool = self._pools[self._domains[client]]
        uniform = generator(self._seed, client=int(client), purpose="bootstrap").random(self._count)
        # Scaled and cut, for `integers` takes as long as all the rest of a draw.
        drawn = (uniform * len(pool)).astype(np.int64)
        drawn.sort()
        return pool[drawn]


def _bootstrap(config: DataConfig, train: DomainData, seed: int) -> Partition:
    pools = [np.flatnonzero(train.domain_of == domain) for domain in range(len(train.domains))]
    if config.clients is None:
        domains = np.repeat(np.arange(len(pools)), config.clients_per_domain)
    elif config.clients < len(pools):
        raise InputError(
            f"data.clients: found {config.clients} with data.partition bootstrap, expected at least one for each of "
            f"the {len(pools)} domains"
        )
    else:
        domains = np.arange(config.clients) % len(pools)
    samples = BootstrapSamples(pools, domains, config.samples_per_client, seed)
    # One value in memory.
    sizes = np.broadcast_to(np.int64(config.samples_per_client), (len(domains),))
    return Partition(samples, domains, by_domain=True, sizes=sizes)


def _divide(
    config: DataConfig, train: DomainData, rows: Rows, clients: int, name: str, seed: int, purpose: str
) -> list[Rows]:
    """Divide the samples `rows` among `clients`."""
    if config.partition in ("dirichlet", "shards") and train.labels is None:
        raise InputError(
            f"data.partition: found {config.partition} with samples that have no label, expected data.columns.label "
            "(a column to tell them apart by), or another partition"
        )
    labels = np.zeros(len(rows), dtype=np.int64) if train.labels is None else train.labels[rows]
    pool = Pool(labels, clients, config.min_samples, name, generator(seed, purpose=purpose))
    check_pool(pool)
    return [np.sort(rows[positions]) for positions in _partitioner(config)(pool)]


def _partitioner(config: DataConfig) -> Partitioner:
    if config.partition == "dirichlet":
        return Dirichlet(config.dirichlet_alpha, config.balanced)
    if config.partition == "shards":
        return Shards(config.shards_per_client)
    return Quantity(config.quantity_sigma) if config.partition == "quantity" else iid


def _natural(config: DataConfig, train: DomainData) -> Partition:
    if train.clients is None:
        raise InputError("data.partition: found natural, but no column names the clients; expected data.columns.client")
    if len(nobodys := np.flatnonzero(train.clients == "")):
        where = f"sample {nobodys[0]}" if train.origins is None else str(train.origins[nobodys[0]])
        raise InputError(
            f"data.columns.client: {where}: found no client name, expected a client of data.partition natural"
        )
    names, of_client = np.unique(train.clients, return_inverse=True)
    order = np.argsort(of_client, kind="stable")
    samples = np.split(order, np.cumsum(np.bincount(of_client))[:-1])
    sizes = np.array([len(rows) for rows in samples])
    if sizes.min() < config.min_samples:
        smallest = str(names[sizes.argmin()])
        raise InputError(
            f"data.min_samples: found {config.min_samples}, but client {smallest!r} has {sizes.min()} training "
            "samples; expected at most as many"
        )
    return Partition(samples, _main_domains(samples, train), by_domain=False)


def _main_domains(samples: Sequence[Rows], train: DomainData) -> NDArray[np.int64]:
    """The domain that most samples of each client are of, int64 [clients]."""
    return np.array([np.bincount(train.domain_of[rows]).argmax() for rows in samples], dtype=np.int64)
