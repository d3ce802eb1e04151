from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fedra_engine.federation.allocation import (
    ReferenceAllocation,
    measure_coverage,
    prefix_allocation,
    repair_coverage,
    uniform_allocation,
    weighted_allocation,
)

DEPTH = 12
CAPACITIES = np.array([12, 10, 8, 6, 4, 3])
# What FedRA's published procedure draws first from a legacy stream of seed 0 that nothing else has moved.
GOLDEN = ["111111111111", "111111110101", "111001110011", "001011101100", "110001000100", "001100010000"]

capacities = st.lists(st.integers(1, DEPTH), min_size=1, max_size=20).map(np.array)
seeds = st.integers(0, 2**32 - 1)


def as_strings(allocation: np.ndarray) -> list[str]:
    return ["".join("01"[int(held)] for held in row) for row in allocation]


def test_reference_allocation_is_the_published_procedure_on_a_fresh_stream() -> None:
    assert as_strings(ReferenceAllocation(CAPACITIES, DEPTH, seed=0)(0)) == GOLDEN


def test_reference_allocation_is_one_stream_over_all_rounds_in_whatever_order_they_are_asked() -> None:
    stream = np.random.RandomState(7)
    expected = []
    for _ in range(4):
        rows = np.zeros((len(CAPACITIES), DEPTH), dtype=bool)
        for row, capacity in zip(rows, CAPACITIES, strict=True):
            row[stream.choice(DEPTH, capacity, replace=False)] = True
        expected.append(rows)
    allocate = ReferenceAllocation(CAPACITIES, DEPTH, seed=7)
    for round in (3, 0, 2, 1, 3):
        np.testing.assert_array_equal(allocate(round), expected[round])


@given(capacities, seeds)
def test_uniform_allocation_gives_every_client_its_capacity(capacities: np.ndarray, seed: int) -> None:
    allocation = uniform_allocation(capacities, DEPTH, np.random.default_rng(seed))
    np.testing.assert_array_equal(allocation.sum(axis=1), capacities)


def test_uniform_allocation_draws_every_pair_of_blocks_equally_often() -> None:
    draws = uniform_allocation(np.full(60_000, 2), 4, np.random.default_rng(0))
    counts = np.unique(draws @ (1 << np.arange(4)), return_counts=True)[1]
    assert len(counts) == 6
    # Six cells of 10,000 expected: a χ² beyond 20.5 has a chance of 0.001.
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 20.5


def test_blocks_are_drawn_in_proportion_to_their_chances() -> None:
    p = np.array([0.1, 0.2, 0.3, 0.4])
    first = weighted_allocation(np.ones(40_000, dtype=np.int64), p, np.random.default_rng(0)).mean(axis=0)
    np.testing.assert_allclose(first, p, atol=0.01)
    # Two draws without replacement: p_i + Σ_j p_j p_i / (1 − p_j).
    both = weighted_allocation(np.full(40_000, 2), p, np.random.default_rng(1)).mean(axis=0)
    expected = [p[i] + sum(p[j] * p[i] / (1 - p[j]) for j in range(4) if j != i) for i in range(4)]
    np.testing.assert_allclose(both, expected, atol=0.01)


@given(capacities, seeds)
def test_blocks_that_are_always_held_come_first_in_their_order(capacities: np.ndarray, seed: int) -> None:
    allocation = uniform_allocation(capacities, DEPTH, np.random.default_rng(seed), always=(7, 2))
    np.testing.assert_array_equal(allocation.sum(axis=1), capacities)
    assert allocation[:, 7].all()
    np.testing.assert_array_equal(allocation[:, 2], capacities > 1)


def test_coverage_counts_holders_and_the_longest_time_without() -> None:
    # Block 2 has no holder in rounds 1 and 2, and none in round 4; block 0 none in round 3.
    rounds = [["111", "100"], ["110", "110"], ["110", "010"], ["011", "001"], ["110", "100"]]
    found = measure_coverage(np.array([[held == "1" for held in row] for row in rows]) for rows in rounds)
    assert (found.complete, found.longest_gap) == (1 / 5, 2)
    np.testing.assert_allclose(found.holders, [7 / 5, 7 / 5, 3 / 5])


@given(capacities, seeds)
def test_repaired_coverage_leaves_no_block_empty_when_capacities_allow(capacities: np.ndarray, seed: int) -> None:
    rng = np.random.default_rng(seed)
    repaired = repair_coverage(uniform_allocation(capacities, DEPTH, rng), rng)
    np.testing.assert_array_equal(repaired.sum(axis=1), capacities)
    assert repaired.any(axis=0).sum() == min(DEPTH, capacities.sum())


@given(capacities, seeds)
def test_repair_leaves_a_covering_allocation_alone(capacities: np.ndarray, seed: int) -> None:
    rng = np.random.default_rng(seed)
    covering = np.vstack([uniform_allocation(capacities, DEPTH, rng), np.ones((1, DEPTH), dtype=bool)])
    np.testing.assert_array_equal(repair_coverage(covering, rng), covering)


@given(capacities)
def test_prefix_allocation_gives_the_first_blocks(capacities: np.ndarray) -> None:
    for row, capacity in zip(prefix_allocation(capacities, DEPTH), capacities, strict=True):
        np.testing.assert_array_equal(np.flatnonzero(row), np.arange(capacity))
