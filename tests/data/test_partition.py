"""The Dirichlet split gives every sample to one client of its domain, and every client enough of them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedra_engine.data.partition import dirichlet_partition
from fedra_engine.errors import InputError


def samples(per_domain: int, domains: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.integers(classes, size=per_domain * domains), np.repeat(np.arange(domains), per_domain)


@given(
    per_domain=st.integers(60, 120),
    domains=st.integers(1, 3),
    classes=st.integers(1, 8),
    clients=st.integers(1, 6),
    alpha=st.sampled_from([1e-3, 0.1, 0.5, 10.0]),
    seed=st.integers(0, 100),
)
def test_every_sample_has_one_client_and_it_is_of_its_domain(
    per_domain: int, domains: int, classes: int, clients: int, alpha: float, seed: int
) -> None:
    labels, of_domain = samples(per_domain, domains, classes)
    partition = dirichlet_partition(
        labels, of_domain, clients_per_domain=clients, alpha=alpha, min_samples=0, seed=seed
    )
    assert len(partition) == domains * clients
    np.testing.assert_array_equal(np.sort(np.concatenate(partition)), np.arange(len(labels)))
    for client, rows in enumerate(partition):
        assert rows.dtype == np.int64
        assert (of_domain[rows] == client // clients).all()


def test_every_client_has_the_minimum() -> None:
    labels, domains = samples(140, 6, 10)
    partition = dirichlet_partition(labels, domains, clients_per_domain=5, alpha=0.5, min_samples=10, seed=0)
    assert min(map(len, partition)) >= 10


def test_small_alpha_skews_the_labels() -> None:
    labels, domains = samples(2000, 1, 10)

    def largest_class_share(alpha: float) -> float:
        split = dirichlet_partition(labels, domains, clients_per_domain=5, alpha=alpha, min_samples=10, seed=0)
        return float(np.mean([np.bincount(labels[rows]).max() / len(rows) for rows in split]))

    assert largest_class_share(0.1) > 2 * largest_class_share(1000.0)


def test_clients_above_average_get_no_more_of_later_classes() -> None:
    """With classes in order, whoever reached the average of 100 before a class has none of it."""
    labels, domains = np.repeat(np.arange(10), 50), np.zeros(500, dtype=np.int64)
    partition = dirichlet_partition(labels, domains, clients_per_domain=5, alpha=0.3, min_samples=1, seed=1)
    for rows in partition:
        before = np.concatenate([[0], np.cumsum(np.bincount(labels[rows], minlength=10))[:-1]])
        assert not np.isin(labels[rows], np.flatnonzero(before >= 100)).any()


def test_a_class_that_a_domain_lacks_is_skipped() -> None:
    labels = np.concatenate([np.zeros(50, dtype=np.int64), np.ones(50, dtype=np.int64)])
    domains = np.repeat([0, 1], 50)
    partition = dirichlet_partition(labels, domains, clients_per_domain=2, alpha=0.5, min_samples=5, seed=0)
    assert sum(map(len, partition)) == 100


def test_the_seed_decides_and_other_domains_do_not() -> None:
    labels, domains = samples(100, 3, 5)
    first, again, other = (
        dirichlet_partition(labels, domains, clients_per_domain=4, alpha=0.5, min_samples=5, seed=seed)
        for seed in (0, 0, 1)
    )
    alone = dirichlet_partition(labels[:100], domains[:100], clients_per_domain=4, alpha=0.5, min_samples=5, seed=0)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(first[:4], alone, strict=True))


def test_more_than_there_is_gets_refused() -> None:
    labels, domains = samples(30, 1, 3)
    with pytest.raises(InputError, match=r"data\.min_samples: found 10 with 4 clients for the 30 .* at most 7"):
        dirichlet_partition(labels, domains, clients_per_domain=4, alpha=0.5, min_samples=10, seed=0)


def test_a_minimum_that_no_draw_meets_gets_refused() -> None:
    labels, domains = np.zeros(40, dtype=np.int64), np.zeros(40, dtype=np.int64)
    with pytest.raises(InputError, match=r"none of 1000 splits of domain 0"):
        dirichlet_partition(labels, domains, clients_per_domain=4, alpha=1e-3, min_samples=10, seed=0)
