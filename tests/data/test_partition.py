"""Every partition gives every sample to one client, every client enough of them, and the same ones everywhere."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from fedra_engine.config import ColumnsConfig, DataConfig, ExperimentConfig
from fedra_engine.config.validation import validate
from fedra_engine.data.domain_data import DomainData, SampleSource, sample_sources
from fedra_engine.data.partition import Partition, partition_by, partition_samples, register_partitioner
from fedra_engine.data.sources import load_source
from fedra_engine.inputs import Inputs
from fedra_engine.runtime.errors import InputError

DIVIDING = ["domain", "iid", "dirichlet", "shards", "quantity"]


def make_data(labels: np.ndarray, domain_of: np.ndarray, clients: Sequence[str] | None = None) -> DomainData:
    return DomainData(
        task="image_classification",
        content=Dataset.from_dict({"image": [0] * len(labels)}),
        domain_of=domain_of,
        domains=[f"d{index}" for index in range(int(domain_of.max()) + 1)],
        labels=labels,
        classes=[str(label) for label in range(int(labels.max()) + 1)],
        is_test=np.zeros(len(labels), dtype=np.bool_),
        clients=None if clients is None else np.array(clients),
    )


def random_data(per_domain: int, domains: int, classes: int) -> DomainData:
    rng = np.random.default_rng(0)
    return make_data(rng.integers(classes, size=per_domain * domains), np.repeat(np.arange(domains), per_domain))


def digest(partition: Partition) -> str:
    parts = [len(rows).to_bytes(8, "little") + rows.astype("<i8").tobytes() for rows in partition.samples]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


@pytest.mark.parametrize("partition", DIVIDING)
@given(
    per_domain=st.integers(60, 120),
    domains=st.integers(1, 3),
    classes=st.integers(1, 8),
    clients=st.integers(1, 6),
    everywhere=st.booleans(),
    skew=st.sampled_from([1e-3, 0.1, 0.5, 3.0]),
    balanced=st.booleans(),
    minimum=st.sampled_from([1, 5, 20]),
    seed=st.integers(0, 100),
)
def test_every_sample_has_one_client_and_every_client_the_minimum(
    partition: str,
    per_domain: int,
    domains: int,
    classes: int,
    clients: int,
    everywhere: bool,
    skew: float,
    balanced: bool,
    minimum: int,
    seed: int,
) -> None:
    data = random_data(per_domain, domains, classes)
    config = DataConfig(
        partition=partition,
        clients_per_domain=clients,
        clients=clients if everywhere and partition != "domain" else None,
        dirichlet_alpha=skew,
        quantity_sigma=skew,
        balanced=balanced,
        min_samples=minimum,
    )
    try:
        found = partition_samples(config, data, seed)
    except InputError as error:
        assert str(error).startswith(f"data.min_samples: found {minimum}")  # noqa: PT017 - also a right answer
        return
    np.testing.assert_array_equal(np.sort(np.concatenate(found.samples)), np.arange(len(data)))
    assert len(found.samples) == len(found.domains)
    for rows, domain in zip(found.samples, found.domains, strict=True):
        assert rows.dtype == np.int64
        assert (np.diff(rows) > 0).all()
        assert len(rows) >= minimum
        if found.by_domain:
            assert (data.domain_of[rows] == domain).all()


GOLDEN = {
    ("domain", None): "e97eca7224b66d45",
    ("iid", None): "41c835f2170840f7",
    ("iid", 7): "743976be0ce77254",
    ("dirichlet", None): "ffd2ee7cf257b91f",
    ("dirichlet", 7): "4839944ec5895ed5",
    ("shards", None): "25ec08ea732ae079",
    ("shards", 7): "72bc42745fd6bfb2",
    ("quantity", None): "d3c94d67d60a2f8b",
    ("quantity", 7): "5fd9312b2df39f4b",
}


@pytest.mark.parametrize(("partition", "clients"), GOLDEN)
def test_the_same_seed_gives_the_same_partition_on_every_platform(partition: str, clients: int | None) -> None:
    config = DataConfig(partition=partition, clients_per_domain=4, clients=clients, quantity_sigma=0.5, min_samples=5)
    assert digest(partition_samples(config, random_data(140, 3, 10), seed=3)) == GOLDEN[partition, clients]


@pytest.mark.parametrize(
    ("seed", "expected"), [(0, "e80958636171b36c"), (1, "67808ae3004fd9e6"), (7, "47277c2751ef5a62")]
)
def test_the_embedded_experiment_keeps_its_partition(seed: int, expected: str) -> None:
    train = load_source(DataConfig(), 0).train
    assert digest(partition_samples(DataConfig(), train, seed)) == expected


def divide(data: DomainData, **settings: object) -> Partition:
    return partition_samples(replace(DataConfig(min_samples=1), **settings), data, seed=0)


def test_iid_clients_have_as_many_samples() -> None:
    sizes = [len(rows) for rows in divide(random_data(103, 2, 5), partition="iid", clients_per_domain=5).samples]
    assert sizes == [21, 21, 21, 20, 20] * 2


def test_by_domain_each_domain_is_one_client() -> None:
    found = divide(random_data(50, 3, 4), partition="domain")
    assert found.domains.tolist() == [0, 1, 2]
    assert [len(rows) for rows in found.samples] == [50, 50, 50]


def test_small_alpha_skews_the_labels() -> None:
    data = random_data(2000, 1, 10)

    def largest_class_share(alpha: float) -> float:
        split = divide(data, dirichlet_alpha=alpha, min_samples=10).samples
        return float(np.mean([np.bincount(data.labels[rows]).max() / len(rows) for rows in split]))

    assert largest_class_share(0.1) > 2 * largest_class_share(1000.0)


def test_balanced_clients_above_average_get_no_more_of_later_classes() -> None:
    """With classes in order, whoever reached the average of 100 before a class has none of it."""
    data = make_data(np.repeat(np.arange(10), 50), np.zeros(500, dtype=np.int64))

    def too_many(balanced: bool) -> bool:
        counts = [
            np.bincount(data.labels[rows], minlength=10)
            for rows in divide(data, dirichlet_alpha=0.3, balanced=balanced).samples
        ]
        before = np.cumsum(counts, axis=1) - counts
        return bool((np.array(counts)[before >= 100] > 0).any())

    assert not too_many(balanced=True)
    assert too_many(balanced=False)


def test_a_class_that_a_domain_lacks_is_skipped() -> None:
    found = divide(make_data(np.repeat([0, 1], 50), np.repeat([0, 1], 50)), clients_per_domain=2, min_samples=5)
    assert sum(map(len, found.samples)) == 100


def test_shards_give_clients_few_classes() -> None:
    data = make_data(np.repeat(np.arange(10), 100), np.zeros(1000, dtype=np.int64))
    found = divide(data, partition="shards", clients=20, shards_per_client=2)
    assert max(len(np.unique(data.labels[rows])) for rows in found.samples) == 2
    assert {len(rows) for rows in found.samples} == {50}


def test_sigma_skews_the_sample_counts() -> None:
    data = random_data(3000, 1, 3)

    def spread(sigma: float) -> float:
        return float(np.std([len(rows) for rows in divide(data, partition="quantity", quantity_sigma=sigma).samples]))

    assert spread(0.0) < 1
    assert spread(1.0) > 10 * spread(0.05) > 0


def test_natural_clients_have_their_own_samples() -> None:
    owners = ["b", "a", "b", "c", "a", "b"]
    data = make_data(np.zeros(6, dtype=np.int64), np.array([0, 0, 1, 1, 0, 1]), owners)
    found = divide(data, partition="natural")
    assert [rows.tolist() for rows in found.samples] == [[1, 4], [0, 2, 5], [3]]
    assert found.domains.tolist() == [0, 1, 1]
    with pytest.raises(InputError, match=r"data\.min_samples: found 2, but client 'c' has 1 training samples"):
        divide(data, partition="natural", min_samples=2)


def test_a_sample_that_is_nobodys_is_reported() -> None:
    data = make_data(np.zeros(3, dtype=np.int64), np.zeros(3, dtype=np.int64), ["a", "", "b"])
    data = replace(data, sample_sources=sample_sources(SampleSource("file, line", number) for number in (1, 2, 3)))
    with pytest.raises(
        InputError, match=r"data\.columns\.client: file, line 2: found no client name, expected a client"
    ):
        divide(data, partition="natural")


@given(owners=st.lists(st.integers(0, 9), min_size=1, max_size=60))
def test_natural_clients_have_every_sample_once(owners: list[int]) -> None:
    zeros = np.zeros(len(owners), dtype=np.int64)
    found = divide(make_data(zeros, zeros, [f"client {owner}" for owner in owners]), partition="natural")
    np.testing.assert_array_equal(np.sort(np.concatenate(found.samples)), np.arange(len(owners)))
    assert all(len({owners[row] for row in rows}) == 1 for rows in found.samples)


def test_natural_needs_to_know_the_clients() -> None:
    with pytest.raises(InputError, match=r"data\.partition: found natural, but no column names the clients"):
        divide(random_data(20, 1, 2), partition="natural")


@pytest.mark.parametrize("partition", ["dirichlet", "shards"])
def test_label_skew_needs_labels(partition: str) -> None:
    data = replace(random_data(20, 1, 2), labels=None)
    with pytest.raises(InputError, match=rf"data\.partition: found {partition} with samples that have no label"):
        divide(data, partition=partition)
    assert len(divide(data, partition="iid", clients_per_domain=4).samples) == 4


def test_bootstrap_clients_are_drawn_when_asked_for() -> None:
    data = random_data(30, 2, 3)
    found = divide(data, partition="bootstrap", clients_per_domain=100_000, samples_per_client=12)
    assert len(found.samples) == 200_000
    assert found.samples[150_000].tolist() == found.samples[150_000].tolist()
    assert found.samples[150_000].tolist() != found.samples[150_001].tolist()
    assert [len(rows) for rows in map(found.samples.__getitem__, range(3))] == [12, 12, 12]
    for client in (0, 99_999, 100_000, 199_999):
        assert (data.domain_of[found.samples[client]] == found.domains[client]).all()
    with pytest.raises(IndexError):
        found.samples[200_000]


def test_bootstrap_deals_the_domains_in_turn_and_no_client_depends_on_how_many_there_are() -> None:
    data = random_data(30, 3, 3)
    few, many = (divide(data, partition="bootstrap", clients=clients, samples_per_client=9) for clients in (4, 1000))
    assert few.domains.tolist() == few.groups(3).tolist() == [0, 1, 2, 0]
    for client in range(4):
        assert (data.domain_of[few.samples[client]] == few.domains[client]).all()
        assert few.samples[client].tolist() == many.samples[client].tolist()
    with pytest.raises(InputError, match=r"data\.clients: found 2 .* expected at least one for each of the 3 domains"):
        divide(data, partition="bootstrap", clients=2)


def test_the_seed_decides_and_other_domains_do_not() -> None:
    data = random_data(100, 3, 5)
    config = DataConfig(clients_per_domain=4, min_samples=5)
    first, again, other = (partition_samples(config, data, seed).samples for seed in (0, 0, 1))
    alone = partition_samples(config, replace(data.select(np.arange(100)), domains=["d0"]), seed=0).samples
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(first[:4], alone, strict=True))


def test_capacities_are_those_of_the_domain_or_dealt_in_turn() -> None:
    data = random_data(60, 3, 2)
    assert divide(data, clients_per_domain=2).groups(3).tolist() == [0, 0, 1, 1, 2, 2]
    assert divide(data, partition="iid", clients=5).groups(3).tolist() == [0, 1, 2, 0, 1]


def test_more_than_there_is_gets_refused() -> None:
    with pytest.raises(InputError, match=r"data\.min_samples: found 10 with 4 clients for the 30 .*'d0'.* at most 7"):
        divide(random_data(30, 1, 3), clients_per_domain=4, min_samples=10)


def test_a_minimum_that_no_draw_meets_gets_refused() -> None:
    data = make_data(np.zeros(40, dtype=np.int64), np.zeros(40, dtype=np.int64))
    with pytest.raises(InputError, match=r"none of 1000 splits of domain 'd0' gave all of its 4 clients"):
        divide(data, clients_per_domain=4, dirichlet_alpha=1e-3, min_samples=10)


@pytest.mark.usefixtures("own_names")
def test_a_registered_partition_is_used_by_its_name() -> None:
    @register_partitioner("halves")
    def halves(config: DataConfig, train: DomainData, seed: int) -> Partition:
        return Partition(np.split(np.arange(len(train)), 2), np.zeros(2, dtype=np.int64), by_domain=False)

    validate(ExperimentConfig(data=DataConfig(partition="halves")))
    assert [len(rows) for rows in divide(random_data(20, 1, 2), partition="halves").samples] == [10, 10]
    validate(ExperimentConfig(data=DataConfig(partition="halves")))
    with pytest.raises(InputError, match=r"^data\.partition: found a second iid to register, expected a name"):
        register_partitioner("iid")


@pytest.mark.usefixtures("own_names")
def test_a_configuration_says_that_its_partitioner_was_handed_over() -> None:
    validate(Inputs(partitioner=object()).described(ExperimentConfig()))


class ByColumn:
    """Of the shape of a partitioner of flwr-datasets: one partition for each value of a column."""

    def __init__(self, column: str) -> None:
        self.column = column
        self._dataset: Dataset | None = None

    @property
    def dataset(self) -> Dataset:
        assert self._dataset is not None
        return self._dataset

    @dataset.setter
    def dataset(self, value: Dataset) -> None:
        assert self._dataset is None, "assigned twice"
        self._dataset = value

    @property
    def num_partitions(self) -> int:
        return len(self.dataset.unique(self.column))

    def load_partition(self, partition_id: int) -> Dataset:
        wanted = sorted(self.dataset.unique(self.column))[partition_id]
        # In another order than they came.
        return self.dataset.filter(lambda value: value == wanted, input_columns=self.column).shuffle(seed=0)


def test_the_partitions_of_flower_are_the_clients() -> None:
    data = replace(random_data(30, 2, 3), clients=np.array([f"user {row % 7}" for row in range(60)]))
    for column, expected in (("mood", data.labels), ("domain", data.domain_of), ("client", np.arange(60) % 7)):
        config = DataConfig(columns=ColumnsConfig(label="mood"), min_samples=1)
        partitioner = partition_by(ByColumn(column))
        for _ in range(2):
            found = partitioner(config, data, 0)
            assert [rows.tolist() for rows in found.samples] == [
                np.flatnonzero(expected == value).tolist() for value in np.unique(expected)
            ]
            assert not found.by_domain
            assert len(found.domains) == len(found.samples)
    with pytest.raises(InputError, match=r"^data\.min_samples: found 10, but client 4 has 8 training samples"):
        partitioner(replace(config, min_samples=10), data, 0)


def test_partitions_of_other_rows_are_refused() -> None:
    class Others(ByColumn):
        def load_partition(self, partition_id: int) -> Dataset:
            return Dataset.from_dict({"text": ["a"]})

    with pytest.raises(InputError, match=r"^partitioner: found no rows with 'fedra_sample', expected those of"):
        partition_by(Others("label"))(DataConfig(), random_data(30, 1, 2), 0)
