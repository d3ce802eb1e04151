"""What is counted, checked and remembered of a round."""

from __future__ import annotations

import json
import logging
import math
from typing import Any

import numpy as np
import pytest
import torch

from fedra_engine.config import TrainingConfig
from fedra_engine.federation.averages import average_measure
from fedra_engine.federation.clients import Clients
from fedra_engine.federation.records import (
    MOST_ALLOCATED,
    ReturnedUpdates,
    RoundMetrics,
    Tally,
    check_finite,
    check_updates,
)
from fedra_engine.federation.work import LocalWork
from fedra_engine.runtime.errors import InputError
from tests.federation.updates import make_updates


def returned(*norms: float) -> ReturnedUpdates:
    """Updates of clients 10, 11, … that went through 1, 2, … samples."""
    count = len(norms)
    return ReturnedUpdates(np.arange(10, 10 + count), np.arange(1, count + 1), np.array(norms))


def in_words(clients: np.ndarray) -> str:
    return ", ".join(f"client {client}" for client in clients)


def test_a_tally_counts_bad_updates_too() -> None:
    tally, rng = Tally(), np.random.default_rng(0)
    assert (tally.mean_loss(), tally.returned().samples) == (None, 0)
    for client, processed, loss, norm in ((7, 4, 6.0, 1.0), (3, 2, 3.0, torch.nan)):
        updates = make_updates(rng, client, np.array([0]), torch.float64)
        updates.processed[:] = processed
        updates.losses[:] = loss
        updates.norms[:] = norm
        tally.add(updates)
    assert (tally.clients, tally.samples, tally.mean_loss()) == (2, 6, 1.5)
    found = tally.returned()
    assert (found.clients.tolist(), found.good.tolist(), found.samples) == ([7, 3], [True, False], 4)


def test_parts_are_merged_in_the_order_of_the_clients() -> None:
    first, second = returned(1.0, 2.0), ReturnedUpdates(np.array([4]), np.array([9]), np.array([5.0]))
    merged = ReturnedUpdates.merged([first, second])
    assert merged.clients.tolist() == [4, 10, 11]
    assert merged.processed.tolist() == [9, 1, 2]
    assert merged.norms.tolist() == [5.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ("norms", "clients", "median"),
    [
        ((1, 1, 1, 10.1), [13], 1),
        ((1, 1, 1, 10), [], 1),
        ((1, 1, 11), [], 0),
        ((0, 0, 0, 5), [], 0),
        ((1, 1, 2, 40, np.inf), [13], 1.5),
    ],
    ids=["far", "just not", "too few to compare", "median of zero", "bad ones do not count"],
)
def test_suspicious_updates(norms: tuple[float, ...], clients: list[int], median: float) -> None:
    found, of_norms = returned(*norms).suspicious()
    assert (found.tolist(), of_norms) == (clients, median)


def test_bad_updates_are_left_out_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        bad = check_updates(returned(1, np.nan, 1), 4, "drop", in_words)
        assert check_updates(returned(1, np.nan, 1), 4, "drop", in_words, warn=False).tolist() == bad.tolist() == [11]
        check_updates(returned(1, 1, 1, 100), 4, "drop", in_words)
    assert caplog.messages == [
        "round 5 leaves out client 11: a loss, gradient or parameter is not finite",
        "round 5 has updates of more than 10 times the median norm, 1, from client 13",
    ]


def test_bad_updates_end_the_run_where_none_may_be_dropped() -> None:
    with pytest.raises(InputError, match=r"in round 5 from client 11, expected finite ones, or"):
        check_updates(returned(1, np.nan), 4, "error", in_words)
    with pytest.raises(InputError, match=r"from client 10, client 11, expected a finite one"):
        check_updates(returned(np.inf, np.nan), 4, "drop", in_words)
    assert check_updates(returned(), 4, "drop", in_words).tolist() == []


def test_a_global_state_must_be_finite() -> None:
    clients = Clients([np.arange(2)], np.zeros(1, dtype=np.int64), np.array([1]))
    work = LocalWork(clients, np.arange(1), TrainingConfig(), seed=0, round=4, lr=0.5)
    check_finite(work, torch.zeros(2), torch.ones(1))
    with pytest.raises(InputError, match=r"after round 5 with a rate of 0\.5"):
        check_finite(work, torch.zeros(2), torch.tensor([1.0, torch.inf]))


def test_a_record_leaves_out_what_was_not_measured() -> None:
    metrics = RoundMetrics(2, participants=0, samples=0, loss=None, lr=0.1, blocks_held=0, seconds=1.0, late=0)
    assert metrics.record() == {
        "round": 2,
        "participants": 0,
        "samples": 0,
        "loss": None,
        "lr": 0.1,
        "blocks_held": 0,
        "seconds": 1.0,
        "late": 0,
    }


def evaluated(**measures: dict[str, float]) -> dict[str, Any]:
    metrics = RoundMetrics(2, participants=1, samples=9, loss=1.0, lr=0.1, blocks_held=2, seconds=1.0)
    metrics.set_measures({"accuracy": {"a": 0.5, "b": 0.25}, **measures})
    return metrics.record()


def test_measures_stand_beside_the_accuracy_and_what_json_has_no_number_for_is_null() -> None:
    record = evaluated(test_loss={"a": 0.5, "b": math.nan}, perplexity={"a": math.inf, "b": 2.0})
    assert record["accuracy"] == {"a": 0.5, "b": 0.25}
    assert record["test_loss"] == {"a": 0.5, "b": None}
    assert record["perplexity"] == {"a": None, "b": 2.0}
    assert "measures" not in record
    assert json.loads(json.dumps(record, allow_nan=False)) == record


def test_the_average_of_a_measure_is_that_of_its_domains() -> None:
    record = evaluated(test_loss={"a": 0.5, "b": math.nan})
    assert average_measure(record, "accuracy") == 0.375
    assert math.isnan(average_measure(record, "test_loss") or 0.0)
    assert average_measure(record, "macro_f1") is None


def allocated(clients: int, depth: int, *, trained: bool) -> RoundMetrics:
    metrics = RoundMetrics(0, participants=clients, samples=9, loss=1.0, lr=0.1, blocks_held=2, seconds=1.0)
    held = np.arange(clients * depth).reshape(clients, depth) % 3 > 0
    metrics.set_allocation(np.arange(5, 5 + clients), held, held & (np.arange(depth) > 1) if trained else held)
    return metrics


def test_a_record_says_who_held_which_block() -> None:
    record = allocated(2, 4, trained=False).record()
    assert record["allocation"] == {"5": [1, 2], "6": [0, 1, 3]}
    assert not {"trained", "holders"} & record.keys()


def test_a_record_says_who_trained_what_where_that_is_not_all_that_is_held() -> None:
    record = allocated(2, 4, trained=True).record()
    assert record["trained"] == {"5": [2], "6": [3]}


def test_of_very_many_participants_a_record_counts_the_holders_of_each_block() -> None:
    record = allocated(MOST_ALLOCATED + 2, 3, trained=False).record()
    assert record["holders"] == [0, MOST_ALLOCATED + 2, MOST_ALLOCATED + 2]
    assert "allocation" not in record
