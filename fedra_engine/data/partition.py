"""The division of training samples among clients: the partitions of the literature, and a registry for others.

Partitions with random sizes are drawn again until every client has `data.min_samples`.
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
"""Most draws of a partition in which every client is to have the minimum."""
SAMPLE_COLUMN = "fedra_sample"
"""Column of sample indices in the data set that `partition_by` gives to a partitioner."""

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Partition:
    """The division of training samples among clients.

    Attributes:
        samples: rows of each client, ascending.
        domains: int64 [clients], the domain of most of each client's samples.
        by_domain: whether every client has samples of one domain only, by the design of the partition.
        sizes: int64 [clients], number of samples; None if `samples` tells it without drawing any.
    """

    samples: Sequence[Rows]
    domains: NDArray[np.int64]
    by_domain: bool
    sizes: NDArray[np.int64] | None = None

    def groups(self, count: int) -> NDArray[np.int64]:
        """Which of `count` entries (capacities, say) each client gets: its domain's, or in turn if clients mix them."""
        return self.domains if self.by_domain else np.arange(len(self.samples)) % max(count, 1)


Partitioner = Callable[[DataConfig, DomainData, int], Partition]
"""Divides training samples by draws from the experiment's seed; raises InputError if it cannot."""


def partition_samples(config: DataConfig, train: DomainData, seed: int) -> Partition:
    """Divide the training samples by `config.partition`: each goes to exactly one client.

    (Except under `bootstrap`, where each client draws with replacement from one domain.)

    Raises:
        InputError: the samples lack the labels or clients that the partition needs, or a client has too few samples.
    """
    return PARTITIONERS[config.partition](config, train, seed)


def register_partitioner(name: str) -> Callable[[Partitioner], Partitioner]:
    """A decorator that registers a function as the partition `name`; InputError if the name is taken."""
    return registering(PARTITIONERS, "data.partition", name)


def partition_by(partitioner: Any) -> Partitioner:
    """Divide by a partitioner of flwr-datasets, or one like it: `dataset`, `num_partitions` and `load_partition(id)`.

    A copy of it gets a data set with a row for every training sample: label, domain and client in columns named as in
    `data.columns`, and the index of the sample in `SAMPLE_COLUMN`.

    Raises:
        InputError: when dividing, if the partitions lack that column, or one is too small.
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
        # flwr's partitioners take a data set once.
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
    """Samples drawn with replacement, anew at every access, so that any number of clients takes no memory.

    Attributes:
        pools: rows of each domain.
        domains: int64 [clients], the domain that each client draws from.
        samples_per_client: number of draws of each client.
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
        # Not `integers`, which takes as long as the rest of a draw together.
        drawn = (uniform * len(pool)).astype(np.int64)
        drawn.sort()
        return pool[drawn]


@dataclass(frozen=True)
class Pool:
    """Samples of classes `labels` [samples] to divide among a number of clients; `name` is for messages."""

    config: DataConfig
    labels: NDArray[np.int64]
    clients: int
    name: str
    rng: np.random.Generator

    def draw_until_minimum(
        self, draw: Callable[[], NDArray[np.int64]], hint: str, sizes: NDArray[np.int64] | None = None
    ) -> NDArray[np.int64]:
        """The first draw that gives every client the minimum.

        Args:
            draw: draws sample counts or, with `sizes`, indices into these, [parts, clients].
            hint: what else the user could change, for the message.
            sizes: int64 [n], sample counts.

        Raises:
            InputError: `MAX_DRAWS` draws failed.
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
    """Uniform draws; sizes differ by at most one sample."""
    return np.array_split(pool.rng.permutation(len(pool.labels)), pool.clients)


def dirichlet(pool: Pool) -> list[Rows]:
    """Label skew: every class is divided in proportions drawn from a Dirichlet distribution (arXiv 1909.06335).

    With `data.balanced`, clients that have the average number of samples already get no more: the split of FedRA's
    experiments (arXiv 2311.11227, §4).
    """
    config = pool.config
    by_class = [pool.rng.permutation(np.flatnonzero(pool.labels == label)) for label in np.unique(pool.labels)]

    def draw() -> NDArray[np.int64]:
        """Sample counts, int64 [classes, clients]."""
        counts = np.zeros((len(by_class), pool.clients), dtype=np.int64)
        for label, members in enumerate(by_class):
            is_open = np.ones(pool.clients, dtype=np.bool_)
            if config.balanced:
                is_open = counts.sum(axis=0) < len(pool.labels) / pool.clients
            shares = pool.rng.dirichlet(np.full(pool.clients, config.dirichlet_alpha)) * is_open
            if shares.sum() == 0:
                # A small alpha can put all of the mass on full clients.
                shares = is_open.astype(np.float64)
            counts[label] = _in_proportion(shares, len(members))
        return counts

    counts = pool.draw_until_minimum(draw, f"a larger data.dirichlet_alpha than {config.dirichlet_alpha:g}")
    owners = np.concatenate([np.repeat(np.arange(pool.clients), row) for row in counts])
    positions = np.concatenate(by_class)
    return [positions[owners == client] for client in range(pool.clients)]


def shards(pool: Pool) -> list[Rows]:
    """Pathological label skew (arXiv 1602.05629): `data.shards_per_client` equal shards of samples sorted by label."""
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
    """Quantity skew: log-normal sample counts, with IID labels.

    `data.quantity_sigma` is the standard deviation of the counts' logarithm; 0 gives equal counts.
    """
    sigma = pool.config.quantity_sigma

    def draw() -> NDArray[np.int64]:
        """Sample counts, int64 [1, clients]."""
        exponents = (sigma * pool.rng.standard_normal(pool.clients)).tolist()
        largest = max(exponents)
        # Rounded, so that the last bit of a platform's exponential does not move a sample.
        weights = np.array([round(math.exp(exponent - largest), 9) for exponent in exponents])
        return _in_proportion(weights, len(pool.labels))[None]

    counts = pool.draw_until_minimum(draw, f"a smaller data.quantity_sigma than {sigma:g}")[0]
    return np.split(pool.rng.permutation(len(pool.labels)), np.cumsum(counts)[:-1])


def _in_proportion(weights: NDArray[np.float64], total: int) -> NDArray[np.int64]:
    """Integers proportional to `weights` that sum to `total`."""
    cuts = np.rint(np.cumsum(weights) / weights.sum() * total).astype(np.int64)
    return np.diff(cuts, prepend=0)


def _divided(config: DataConfig, train: DomainData, seed: int, divide: Callable[[Pool], list[Rows]]) -> Partition:
    """Divide each domain, or with `data.clients` all of the data, among its clients."""
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
    # Takes the memory of one value.
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
    """A partition by client; InputError if one has too few samples. `names` are for messages."""
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
    """The domain of most of each client's samples, int64 [clients]."""
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
"""Values of `data.partition`."""
