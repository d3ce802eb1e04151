from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedra_engine.federation.aggregation import Aggregator
from fedra_engine.federation.work import ClientUpdates
from fedra_engine.models.state import GlobalState

BLOCKS, SIZE, HEAD = 5, 7, 4


def make_updates(rng: np.random.Generator, client: int, blocks: np.ndarray, dtype: torch.dtype) -> ClientUpdates:
    """One client's update, in banks with rows that belong to nobody."""
    slots = rng.permutation(len(blocks) + 2)[: len(blocks)]
    return ClientUpdates(
        clients=np.array([client]),
        samples=rng.integers(1, 500, size=1),
        processed=np.array([1]),
        losses=torch.zeros(1, dtype=torch.float64),
        adapters=torch.from_numpy(rng.normal(size=(len(blocks) + 2, SIZE))).to(dtype),
        slots=torch.from_numpy(slots),
        slot_owners=np.zeros(len(blocks), dtype=np.int64),
        slot_blocks=blocks,
        heads=torch.from_numpy(rng.normal(size=(3, HEAD))).to(dtype),
        head_rows=torch.from_numpy(rng.integers(0, 3, size=1)),
        head_owners=np.zeros(1, dtype=np.int64),
        head_exits=np.zeros(1, dtype=np.int64),
    )


def make_round(
    seed: int, allocation: np.ndarray, dtype: torch.dtype = torch.float64
) -> tuple[GlobalState, list[ClientUpdates]]:
    rng = np.random.default_rng(seed)
    adapters, head = (torch.from_numpy(rng.normal(size=size)).to(dtype) for size in ((BLOCKS, SIZE), HEAD))
    previous = GlobalState(adapters, head[None])
    return previous, [make_updates(rng, client, np.flatnonzero(row), dtype) for client, row in enumerate(allocation)]


def aggregate(
    previous: GlobalState,
    updates: list[ClientUpdates],
    weighting: str = "uniform",
    deterministic: bool = False,
) -> GlobalState:
    aggregator = Aggregator(previous, weighting=weighting, deterministic=deterministic)
    for update in updates:
        aggregator.add(update)
    return aggregator.result()


def merge(aggregator: Aggregator, other: Aggregator) -> None:
    """Add up their sums in `aggregator`, as processes do."""
    for mine, theirs in zip(aggregator.sums(), other.sums(), strict=True):
        mine += theirs


allocations = st.lists(
    st.lists(st.booleans(), min_size=BLOCKS, max_size=BLOCKS).filter(any), min_size=1, max_size=8
).map(np.array)
settings = (allocations, st.integers(0, 2**32 - 1), st.sampled_from(["uniform", "samples"]))


@given(*settings)
def test_each_block_is_averaged_over_its_holders(allocation: np.ndarray, seed: int, weighting: str) -> None:
    previous, updates = make_round(seed, allocation)
    found = aggregate(previous, updates, weighting)
    weights = [float(u.samples[0]) if weighting == "samples" else 1.0 for u in updates]
    for block in range(BLOCKS):
        held = [
            (weight, u.adapters[u.slots[list(u.slot_blocks).index(block)]])
            for u, weight in zip(updates, weights, strict=True)
            if block in u.slot_blocks
        ]
        total = sum(weight for weight, _ in held)
        expected = sum(weight * value for weight, value in held) / total if held else previous.adapters[block]
        torch.testing.assert_close(found.adapters[block], expected)
    heads = sum(w * u.heads[u.head_rows[0]] for w, u in zip(weights, updates, strict=True)) / sum(weights)
    torch.testing.assert_close(found.heads[0], heads)


@given(*settings)
def test_a_block_nobody_held_keeps_its_value(allocation: np.ndarray, seed: int, weighting: str) -> None:
    allocation = allocation.copy()
    allocation[:, 2] = False
    allocation[:, 0] = True
    previous, updates = make_round(seed, allocation)
    assert torch.equal(aggregate(previous, updates, weighting).adapters[2], previous.adapters[2])


@given(*settings)
def test_order_of_arrival_does_not_change_the_result(allocation: np.ndarray, seed: int, weighting: str) -> None:
    previous, updates = make_round(seed, allocation, torch.float32)
    forward, backward = (aggregate(previous, order, weighting) for order in (updates, updates[::-1]))
    torch.testing.assert_close(forward.adapters, backward.adapters, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(forward.heads, backward.heads, rtol=1e-7, atol=1e-7)


@given(*settings)
def test_deterministic_aggregation_is_bitwise_independent_of_order_and_portions(
    allocation: np.ndarray, seed: int, weighting: str
) -> None:
    previous, updates = make_round(seed, allocation)
    whole = aggregate(previous, updates, weighting, deterministic=True)
    first = Aggregator(previous, weighting=weighting, deterministic=True)
    second = Aggregator(previous, weighting=weighting, deterministic=True)
    for position, update in enumerate(reversed(updates)):
        (first if position % 2 else second).add(update)
    merge(first, second)
    assert torch.equal(first.result().adapters, whole.adapters)
    assert torch.equal(first.result().heads, whole.heads)
    torch.testing.assert_close(whole.adapters, aggregate(previous, updates, weighting).adapters)


@given(*settings)
def test_merging_parts_equals_adding_all_at_once(allocation: np.ndarray, seed: int, weighting: str) -> None:
    previous, updates = make_round(seed, allocation)
    first = Aggregator(previous, weighting=weighting)
    second = Aggregator(previous, weighting=weighting)
    for update in updates[: len(updates) // 2]:
        first.add(update)
    for update in updates[len(updates) // 2 :]:
        second.add(update)
    merge(first, second)
    whole = aggregate(previous, updates, weighting)
    torch.testing.assert_close(first.result().adapters, whole.adapters)
    torch.testing.assert_close(first.result().heads, whole.heads)


@pytest.mark.parametrize("deterministic", [False, True])
def test_memory_does_not_grow_with_clients(deterministic: bool) -> None:
    previous, updates = make_round(0, np.ones((50, BLOCKS), dtype=bool))
    aggregator = Aggregator(previous, deterministic=deterministic)
    sizes = set()
    for update in updates:
        aggregator.add(update)
        sums = (aggregator._adapters, aggregator._heads)
        sizes.add(sum(part.numel() for total in sums for part in total._parts))
    assert len(sizes) == 1
