"""Which training samples each client has: the partitions of the literature, and those that users register.

A partition that divides gives every sample of a pool to exactly one client. Those whose sizes are random draw again
until every client has the minimum.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedra_engine.config import DataConfig
from fedra_engine.config.options import registering
from fedra_engine.data.domain_data import DomainData
from fedra_engine.runtime.errors import InputError
from fedra_engine.runtime.randomness import generator

MAX_DRAWS = 1000
"""Draws after which a split with the minimum for every client is taken to be out of reach."""
SAMPLE_COLUMN = "fedra_sample"
"""The column of the data set that `partition_by` hands over which says what sample a row is."""

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


Partitioner = Callable[[DataConfig, DomainData, int], Partition]
"""Divides training samples; all draws come from the experiment's seed. Raises InputError where it cannot."""


def partition_samples(config: DataConfig, train: DomainData, seed: int) -> Partition:
    """Divide the training samples by `config.partition`; every sample goes to exactly one client.

    (Not so under `bootstrap`, where clients draw with replacement, each from one domain.)

    Raises:
        InputError: what the partition goes by is not known of these samples, or a client has too few of them.
    """
    return PARTITIONERS[config.partition](config, train, seed)


def register_partitioner(name: str) -> Callable[[Partitioner], Partitioner]:
    """A decorator that makes a function the partition `name`.

    Raises:
        InputError: the name is taken.
    """
    return registering(PARTITIONERS, "data.partition", name)


def partition_by(partitioner: Any) -> Partitioner:
    """Divide by a partitioner of flwr-datasets, or one like it: `dataset`, `num_partitions` and `load_partition(id)`.

    A copy of it is handed a data set with a row for every training sample: label, domain and client by the names that
    `data.columns` gives them, and `SAMPLE_COLUMN`, by which the rows of its partitions are recognised.

    Raises:
        InputError: when dividing, it makes no partitions of these rows, or one that is too small.
    """

    def divide(config: DataConfig, train: DomainData, seed: int) -> Partition:
        from datasets import ClassLabel, Dataset

        names, label = config.columns, config.columns.label or "label"
        columns = {names.domain or "domain": np.array(train.domains)[train.domain_of]}
        if train.clients is not None:
            columns[names.client or "client"] = train.clients
        if train.labels is not None:
            columns[label] = train.labels
        data = Dataset.from_dict(columns | {SAMPLE_COLUMN: np.arange(len(train))})
        # It can be given one data set only.
        own = copy.deepcopy(partitioner)
        own.dataset = data if train.labels is None else data.cast_column(label, ClassLabel(names=train.classes))
        parts = [own.load_partition(client) for client in range(own.num_partitions)]
        if not parts or any(SAMPLE_COLUMN not in part.column_names for part in parts):
            raise InputError(f"partitioner: found no rows with {SAMPLE_COLUMN!r}, expected those of the given data set")
        samples = [np.sort(np.array(part[SAMPLE_COLUMN], dtype=np.int64)) for part in parts]
        return _of_clients(config, train, samples, [str(client) for client in range(len(parts))])

    return divide


@dataclass(frozen=True, eq=False)
class BootstrapSamples(Sequence[Rows]):
    """Samples of any number of clients, drawn with replacement when they are asked for and never stored.

    Attributes:
        pools: rows of each domain.
        domains: int64 [clients], the domain that each client draws from.
        samples_per_client: how many each draws.
        seed: of the experiment.
    """

    pools: Sequence[Rows]
    domains: NDArray[np.int64]
    samples_per_client: int
    seed: int

    def __len__(self) -> int:
        return len(self.domains)

    def __getitem__(self, client: Any) -> Any:
        if not 0 <= client < len(self):
            raise IndexError(client)
        pool = self.pools[self.domains[client]]
        uniform = generator(self.seed, client=int(client), purpose="bootstrap").random(self.samples_per_client)
        # Scaled and cut, for `integers` takes as long as all the rest of a draw.
        drawn = (uniform * len(pool)).astype(np.int64)
        drawn.sort()
        return pool[drawn]


@dataclass(frozen=True)
class Pool:
    """Samples to divide, of the classes `labels` [samples], among so many `clients`; messages call them `name`."""

    config: DataConfig
    labels: NDArray[np.int64]
    clients: int
    name: str
    rng: np.random.Generator

    def draw_until_minimum(
        self, draw: Callable[[], NDArray[np.int64]], hint: str, sizes: NDArray[np.int64] | None = None
    ) -> NDArray[np.int64]:
        """The first draw [parts, clients] of sample counts, or of what has these `sizes`, that gives all the minimum.

        Raises:
            InputError: there is none among `MAX_DRAWS`; `hint` says what else could be changed.
        """
        for _ in range(MAX_DRAWS):
            drawn = draw()
            counts = drawn if sizes is None else sizes[drawn]
            if counts.sum(axis=0).min() >= self.config.min_samples:
                return drawn
        raise InputError(
            f"data.min_samples: found {self.config.min_samples}, which none of {MAX_DRAWS} splits of {self.name} gave "
            f"all of its {self.clients} clients; expected fewer, or {hint}"
        )


def iid(pool: Pool) -> list[Rows]:
    """Every client gets as many samples, drawn uniformly; sizes differ by one at most."""
    return np.array_split(pool.rng.permutation(len(pool.labels)), pool.clients)


def dirichlet(pool: Pool) -> list[Rows]:
    """Label skew: every class is divided in proportions drawn from a Dirichlet distribution (arXiv 1909.06335).

    With `data.balanced`, clients that already have their average share get nothing more: the split of FedRA's
    experiments (arXiv 2311.11227, §4).
    """
    config = pool.config
    by_class = [pool.rng.permutation(np.flatnonzero(pool.labels == label)) for label in np.unique(pool.labels)]

    def draw() -> NDArray[np.int64]:
        """How many samples of each class go to each client, int64 [classes, clients]."""
        counts = np.zeros((len(by_class), pool.clients), dtype=np.int64)
        for label, members in enumerate(by_class):
            is_open = np.ones(pool.clients, dtype=np.bool_)
            if config.balanced:
                is_open = counts.sum(axis=0) < len(pool.labels) / pool.clients
            shares = pool.rng.dirichlet(np.full(pool.clients, config.dirichlet_alpha)) * is_open
            if shares.sum() == 0:
                # A small alpha can put all of the mass on clients that are full.
                shares = is_open.astype(np.float64)
            counts[label] = _in_proportion(shares, len(members))
        return counts

    counts = pool.draw_until_minimum(draw, f"a larger data.dirichlet_alpha than {config.dirichlet_alpha:g}")
    owners = np.concatenate([np.repeat(np.arange(pool.clients), row) for row in counts])
    positions = np.concatenate(by_class)
    return [positions[owners == client] for client in range(pool.clients)]


def shards(pool: Pool) -> list[Rows]:
    """Pathological label skew (arXiv 1602.05629): samples sorted by label, cut into equal shards, some for each client.

    Most of the `data.shards_per_client` have one label only.
    """
    each = pool.config.shards_per_client
    order = pool.rng.permutation(len(pool.labels))
    order = order[np.argsort(pool.labels[order], kind="stable")]
    cut = np.array_split(order, pool.clients * each)
    sizes = np.array([len(shard) for shard in cut])

    def draw() -> NDArray[np.int64]:
        return pool.rng.permutation(len(cut)).reshape(each, pool.clients)

    dealt = pool.draw_until_minimum(draw, "fewer data.shards_per_client", sizes)
    return [np.concatenate([cut[shard] for shard in hand]) for hand in dealt.T]


def quantity(pool: Pool) -> list[Rows]:
    """Quantity skew: sample counts in proportion to draws of a log-normal distribution; labels are IID.

    The standard deviation of the logarithm of the counts is `data.quantity_sigma`; 0 gives all clients as many.
    """

    sigma = pool.config.quantity_sigma

    def draw() -> NDArray[np.int64]:
        """Samples of each client, int64 [1, clients]."""
        exponents = (sigma * pool.rng.standard_normal(pool.clients)).tolist()
        largest = max(exponents)
        # Rounded, so that the last bit of a platform's exponential does not move a sample.
        weights = np.array([round(math.exp(exponent - largest), 9) for exponent in exponents])
        return _in_proportion(weights, len(pool.labels))[None]

    counts = pool.draw_until_minimum(draw, f"a smaller data.quantity_sigma than {sigma:g}")[0]
    return np.split(pool.rng.permutation(len(pool.labels)), np.cumsum(counts)[:-1])


def _in_proportion(weights: NDArray[np.float64], total: int) -> NDArray[np.int64]:
    """Whole numbers in proportion to `weights` that add up to `total`."""
    cuts = np.rint(np.cumsum(weights) / weights.sum() * total).astype(np.int64)
    return np.diff(cuts, prepend=0)


def _divided(config: DataConfig, train: DomainData, seed: int, divide: Callable[[Pool], list[Rows]]) -> Partition:
    """Each domain, or all of the data, divided among its clients by `divide`."""
    if train.labels is None and divide in (dirichlet, shards):
        raise InputError(
            f"data.partition: found {config.partition} with samples that have no label, expected data.columns.label "
            "(a column to tell them apart by), or another partition"
        )

    def divided(rows: Rows, clients: int, name: str, purpose: str) -> list[Rows]:
        if len(rows) < clients * config.min_samples:
            raise InputError(
                f"data.min_samples: found {config.min_samples} with {clients} clients for the {len(rows)} training "
                f"samples of {name}, expected at most {len(rows) // clients}, or fewer clients "
                "(data.clients_per_domain, data.clients or data.partition domain)"
            )
        labels = np.zeros(len(rows), dtype=np.int64) if train.labels is None else train.labels[rows]
        pool = Pool(config, labels, clients, name, generator(seed, purpose=purpose))
        return [np.sort(rows[positions]) for positions in divide(pool)]

    if config.clients is not None:
        samples = divided(np.arange(len(train)), config.clients, "the data", "partition")
        return Partition(samples, _main_domains(samples, train), by_domain=False)
    clients = 1 if config.partition == "domain" else config.clients_per_domain
    samples = []
    for domain, rows in enumerate(_by_domain(train)):
        samples += divided(rows, clients, f"domain {train.domains[domain]!r}", f"partition of domain {domain}")
    return Partition(samples, np.repeat(np.arange(len(train.domains)), clients), by_domain=True)


def _bootstrap(config: DataConfig, train: DomainData, seed: int) -> Partition:
    pools = _by_domain(train)
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


def _natural(config: DataConfig, train: DomainData, seed: int) -> Partition:
    if train.clients is None:
        raise InputError("data.partition: found natural, but no column names the clients; expected data.columns.client")
    if len(nobodys := np.flatnonzero(train.clients == "")):
        raise InputError(
            f"data.columns.client: {train.describe(nobodys[0], 'sample')}: found no client name, expected a client of "
            "data.partition natural"
        )
    names, of_client = np.unique(train.clients, return_inverse=True)
    order = np.argsort(of_client, kind="stable")
    samples = np.split(order, np.cumsum(np.bincount(of_client))[:-1])
    return _of_clients(config, train, samples, [repr(str(name)) for name in names])


def _of_clients(config: DataConfig, train: DomainData, samples: Sequence[Rows], names: Sequence[str]) -> Partition:
    """Clients that mix domains, if none has too few samples; messages call them by their `names`."""
    sizes = [len(rows) for rows in samples]
    if (smallest := min(sizes)) < config.min_samples:
        raise InputError(
            f"data.min_samples: found {config.min_samples}, but client {names[sizes.index(smallest)]} has {smallest} "
            "training samples; expected at most as many"
        )
    return Partition(samples, _main_domains(samples, train), by_domain=False)


def _by_domain(train: DomainData) -> list[Rows]:
    return [np.flatnonzero(train.domain_of == domain) for domain in range(len(train.domains))]


def _main_domains(samples: Sequence[Rows], train: DomainData) -> NDArray[np.int64]:
    """The domain that most samples of each client are of, int64 [clients]."""
    return np.array([np.bincount(train.domain_of[rows]).argmax() for rows in samples], dtype=np.int64)


PARTITIONERS: dict[str, Partitioner] = {
    "domain": partial(_divided, divide=iid),
    "iid": partial(_divided, divide=iid),
    "dirichlet": partial(_divided, divide=dirichlet),
    "shards": partial(_divided, divide=shards),
    "quantity": partial(_divided, divide=quantity),
    "natural": _natural,
    "bootstrap": _bootstrap,
}
"""By the name that `data.partition` gives them."""
