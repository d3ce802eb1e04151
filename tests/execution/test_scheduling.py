"""How the participants of a round, and samples, are divided over processes; no processes are started."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedra_engine.config import TrainingConfig
from fedra_engine.execution.evaluation import portions
from fedra_engine.execution.scheduling import Pace, WorkDivision, balance, predicted_costs
from fedra_engine.federation.assignment import Assignment
from fedra_engine.federation.clients import Clients
from fedra_engine.federation.work import LocalWork
from fedra_engine.runtime.processes import Processes

CAPACITIES = np.array([12, 10, 8, 6, 4, 3])


def local_work(sizes: Sequence[int], capacities: np.ndarray, max_steps: int | None = None) -> LocalWork:
    """Every client takes part, with that many samples."""
    starts = np.cumsum([0, *sizes])
    samples = [np.arange(start, start + size) for start, size in zip(starts, sizes, strict=False)]
    clients = Clients(samples, np.zeros(len(sizes), dtype=np.int64), capacities)
    training = TrainingConfig(batch_size=16, local_epochs=1, max_local_steps=max_steps)
    return LocalWork(clients, np.arange(len(sizes)), training, seed=0, round=0, lr=0.1)


def loads(costs: np.ndarray, owners: np.ndarray, processes: int) -> np.ndarray:
    return np.bincount(owners, weights=costs, minlength=processes)


def skewed_costs(processes: int, sigma: float, max_steps: int | None, seed: int) -> np.ndarray:
    """Of twelve participants a process, with log-normal numbers of samples, as of `data.partition quantity`."""
    rng, count = np.random.default_rng(seed), 12 * processes
    capacities = np.resize(CAPACITIES, count)
    work = local_work(np.ceil(60 * rng.lognormal(0, sigma, count)).astype(int).tolist(), capacities, max_steps)
    return predicted_costs(np.arange(12) < capacities[:, None], work, None)


@pytest.mark.parametrize("processes", [2, 8, 64])
@pytest.mark.parametrize(("sigma", "max_steps"), [(0.5, None), (1.0, 5)])
def test_the_slowest_process_is_predicted_to_take_at_most_5_percent_longer_than_the_mean(
    processes: int, sigma: float, max_steps: int | None
) -> None:
    for seed in range(20):
        costs = skewed_costs(processes, sigma, max_steps, seed)
        spent = loads(costs, balance(costs, np.ones(processes)), processes)
        assert spent.max() <= 1.05 * spent.mean()


@pytest.mark.parametrize("processes", [2, 8, 64])
def test_where_one_participant_takes_longer_than_that_its_process_trains_nobody_else(processes: int) -> None:
    for seed in range(20):
        costs = skewed_costs(processes, 1.5, None, seed)
        spent = loads(costs, balance(costs, np.ones(processes)), processes)
        assert spent.max() <= max(1.05 * spent.mean(), costs.max())


@given(st.lists(st.floats(0.1, 1000), max_size=40), st.integers(1, 9))
def test_the_busiest_process_does_at_most_a_participant_more_than_the_mean(costs: list[float], processes: int) -> None:
    owners = balance(np.array(costs), np.ones(processes))
    spent = loads(np.array(costs), owners, processes)
    assert len(owners) == len(costs)
    assert spent.max() <= spent.mean() + max(costs, default=0.0) + 1e-9
    assert (spent > 0).sum() == min(processes, len(costs))


def test_costs_are_blocks_times_steps_times_tokens() -> None:
    held = np.array([[True, True, False], [True, False, False], [True, True, True]])
    work = local_work([40, 10, 4], held.sum(axis=1))
    # 40 samples are 3 steps of 16, the others one step of all they have.
    np.testing.assert_allclose(predicted_costs(held, work, None), [2 * 3 * 16, 1 * 1 * 10, 3 * 1 * 4])
    lengths = torch.cat([torch.full((40,), 5), torch.full((10,), 7), torch.tensor([1, 2, 3, 4])])
    np.testing.assert_allclose(predicted_costs(held, work, lengths), [96 * 5, 10 * 7, 12 * 2.5])


def test_a_process_measured_to_be_slower_is_given_less() -> None:
    costs, pace = np.full(120, 2.0), Pace(3)
    assert loads(costs, balance(costs, pace.seconds_per_cost()), 3).tolist() == [80, 80, 80]
    pace.learn(np.full(3, 80.0), np.array([1.0, 1.0, 2.0]))
    spent = loads(costs, balance(costs, pace.seconds_per_cost()), 3)
    np.testing.assert_allclose(spent, [96, 96, 48], atol=2)


def test_the_pace_follows_a_process_that_becomes_slower() -> None:
    pace = Pace(2)
    pace.learn(np.ones(2), np.ones(2))
    for _ in range(10):
        pace.learn(np.ones(2), np.array([1.0, 4.0]))
    np.testing.assert_allclose(pace.seconds_per_cost(), [1, 4], rtol=0.01)


def test_a_round_counts_half_of_the_next_one() -> None:
    pace = Pace(1)
    pace.learn(np.array([10.0]), np.array([10.0]))
    pace.learn(np.array([20.0]), np.array([5.0]))
    assert pace.seconds_per_cost().tolist() == [(5 + 5) / (5 + 20)]


def test_a_process_that_trained_nobody_yet_counts_as_fast_as_the_others() -> None:
    pace = Pace(3)
    pace.learn(np.array([10.0, 30.0, 0.0]), np.array([10.0, 10.0, 0.0]))
    np.testing.assert_allclose(pace.seconds_per_cost(), [1, 1 / 3, 0.5])


class UnequalProcesses(Processes):
    """The first of two processes, of which the other always says that it took a hundred times as long."""

    def __init__(self) -> None:
        super().__init__(0, 2, torch.device("cpu"))

    def any(self, flag: bool) -> bool:
        return flag

    def all_gather_object(self, value: float) -> list[float]:
        return [value, 100 * value]


@pytest.mark.parametrize(("by_cost_alone", "shares"), [(False, [6, 12]), (True, [6, 6])])
def test_clients_divided_by_cost_alone_stay_where_they_are_however_slow_that_is(
    by_cost_alone: bool, shares: list[int]
) -> None:
    capacities = np.full(12, 4)
    work = local_work([10] * 12, capacities)
    division, found = WorkDivision(UnequalProcesses(), None, by_cost_alone=by_cost_alone), []
    for _ in range(2):
        with division.share(work, Assignment(np.ones((12, 4), dtype=bool))) as (mine, assignment):
            assert len(assignment.held) == len(mine.participants)
            found.append(len(mine.participants))
    assert found == shares


@given(st.integers(0, 70), st.integers(1, 6), st.integers(1, 10))
def test_portions_hold_every_sample_once_and_are_equally_many(samples: int, count: int, size: int) -> None:
    rows = torch.arange(100, 100 + samples)
    shares = [portions(rows, size, Processes(index, count, torch.device("cpu"))) for index in range(count)]
    assert {len(share) for share in shares} == {-(-samples // (size * count))}
    counted = [row for share in shares for portion in share if not portion.is_padding for row in portion.rows.tolist()]
    assert sorted(counted) == rows.tolist()
    assert all(0 < len(portion.rows) <= size for share in shares for portion in share)
    padding = [portion.rows.tolist() for share in shares for portion in share if portion.is_padding]
    assert all(sample == [100] for sample in padding)


def test_one_process_gets_the_samples_in_order() -> None:
    shares = portions(torch.arange(10), 4, Processes.alone())
    assert [portion.rows.tolist() for portion in shares] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
