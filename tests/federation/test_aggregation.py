from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedra_engine.federation.aggregation import Aggregator, Averaging
from fedra_engine.federation.updates import ClientUpdates
from fedra_engine.models.adapters import AdapterLayout, Target
from fedra_engine.models.state import GlobalState

from .updates import ALLOCATION, BLOCKS, SIZE, make_round


def aggregate(
    previous: GlobalState,
    updates: list[ClientUpdates],
    weighting: str = "uniform",
    deterministic: bool = False,
) -> GlobalState:
    aggregator = Aggregator(previous, Averaging(weighting, deterministic))
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
    first = Aggregator(previous, Averaging(weighting, deterministic=True))
    second = Aggregator(previous, Averaging(weighting, deterministic=True))
    for position, update in enumerate(reversed(updates)):
        (first if position % 2 else second).add(update)
    merge(first, second)
    assert torch.equal(first.result().adapters, whole.adapters)
    assert torch.equal(first.result().heads, whole.heads)
    torch.testing.assert_close(whole.adapters, aggregate(previous, updates, weighting).adapters)


@given(*settings)
def test_merging_parts_equals_adding_all_at_once(allocation: np.ndarray, seed: int, weighting: str) -> None:
    previous, updates = make_round(seed, allocation)
    first = Aggregator(previous, Averaging(weighting))
    second = Aggregator(previous, Averaging(weighting))
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
    aggregator = Aggregator(previous, Averaging(deterministic=deterministic))
    sizes = set()
    for update in updates:
        aggregator.add(update)
        sums = (aggregator._adapters, aggregator._heads)
        sizes.add(sum(part.numel() for total in sums for part in total._parts))
    assert len(sizes) == 1


def test_a_rank_that_no_holder_has_is_not_trained_and_keeps_its_value() -> None:
    layout, ranks = AdapterLayout((Target("fc", 2, 1, 2, 1.0),)), np.array([1, 1, 2, 1, 1])
    previous, updates = make_round(0, ALLOCATION)
    aggregator = Aggregator(previous, Averaging(layout=layout, ranks=ranks))
    for update in updates:
        layout.truncate(update.adapters, int(ranks[update.clients[0]]))
        aggregator.add(update)
    low = torch.ones(SIZE)
    layout.truncate(low, 1)
    found, trained = aggregator.result(), aggregator.trained().expand(BLOCKS, SIZE)
    # Client 2 has both ranks, and nobody the last block.
    for block, held in enumerate(ALLOCATION.T):
        expected = torch.ones(SIZE) if held[2] else low if held.any() else torch.zeros(SIZE)
        assert trained[block].tolist() == expected.bool().tolist()
        assert torch.equal(found.adapters[block][~trained[block]], previous.adapters[block][~trained[block]])
        assert (found.adapters[block][trained[block]] != previous.adapters[block][trained[block]]).all()
