from __future__ import annotations

import numpy as np
import pytest

from fedra_engine.config import ClientsConfig, DeviceConfig, TrainingConfig
from fedra_engine.data.partition import BootstrapSamples
from fedra_engine.federation.clients import (
    Clients,
    capacities_by_domain,
    check_sampling,
    devices_by_domain,
    draw_devices,
    ranks_by_domain,
    sample_participants,
)
from fedra_engine.federation.work import LocalWork, local_batches, local_step_counts, with_step_limit
from fedra_engine.runtime.errors import InputError
from fedra_engine.runtime.randomness import generator

DOMAINS = np.repeat(np.arange(3), 4)
NAMES = ["photo", "sketch", "cartoon"]
CLIENTS = Clients([np.arange(5)] * 12, DOMAINS, np.full(12, 2))
GOLDEN_DRAW = [76, 420, 801, 38]


class Undrawn(BootstrapSamples):
    def __getitem__(self, client):
        raise AssertionError("samples were drawn")


def test_samples_drawn_on_demand_are_counted_without_drawing_them() -> None:
    domains = np.arange(100_000) % 2
    samples = Undrawn([np.arange(5), np.arange(5, 9)], domains, 12, seed=0)
    clients = Clients(samples, domains, np.full(100_000, 2), sizes=np.full(100_000, 12))
    assert clients.sample_counts(np.array([3, 99_999])).tolist() == [12, 12]
    assert with_step_limit(TrainingConfig(batch_size=5, local_epochs=1, even_steps=True), clients).max_local_steps == 4


def batches(max_steps: int | None = None, **changes: int) -> list[np.ndarray]:
    training = TrainingConfig(batch_size=4, local_epochs=2, max_local_steps=max_steps)
    return local_batches(np.arange(100, 110), training, **({"seed": 0, "round": 0, "client": 0} | changes))


def test_every_epoch_visits_every_sample_once_in_a_new_order() -> None:
    steps = batches()
    assert [len(step) for step in steps] == [4, 4, 2, 4, 4, 2]
    first, second = np.concatenate(steps[:3]), np.concatenate(steps[3:])
    np.testing.assert_array_equal(np.sort(first), np.arange(100, 110))
    np.testing.assert_array_equal(np.sort(second), np.arange(100, 110))
    assert (first != second).any()


def test_max_steps_cuts_the_epochs_short() -> None:
    for step, whole in zip(batches(max_steps=4), batches()[:4], strict=True):
        np.testing.assert_array_equal(step, whole)


@pytest.mark.parametrize("max_steps", [None, 1, 4, 100])
@pytest.mark.parametrize("count", [1, 3, 4, 5, 8, 10])
def test_step_counts_are_those_of_the_batches(count: int, max_steps: int | None) -> None:
    training = TrainingConfig(batch_size=4, local_epochs=2, max_local_steps=max_steps)
    steps = local_batches(np.arange(count), training, seed=0, round=0, client=0)
    assert local_step_counts(np.array([count]), training).tolist() == [len(steps)]


@pytest.mark.parametrize(
    ("epochs", "max_steps", "expected"), [(1, None, [3, 3, 2, 3]), (2, None, [5, 5, 4, 5]), (1, 2, [2, 2, 2, 2])]
)
def test_even_steps_are_at_most_one_more_than_the_smallest_client_takes(
    epochs: int, max_steps: int | None, expected: list[int]
) -> None:
    samples = [np.arange(count) for count in (40, 12, 8, 9)]
    clients = Clients(samples, np.zeros(4, dtype=np.int64), np.ones(4, dtype=np.int64))
    training = TrainingConfig(batch_size=4, local_epochs=epochs, max_local_steps=max_steps, even_steps=True)
    # The smallest client counts although it does not take part.
    participants = np.array([0, 1, 3])
    with pytest.raises(AssertionError, match="with_step_limit"):
        LocalWork(clients, participants, training, seed=0, round=0, lr=0.1)
    limited = with_step_limit(training, clients)
    work = LocalWork(clients, participants, limited, seed=0, round=0, lr=0.1)
    assert work.steps().tolist() == [expected[client] for client in participants]
    assert [len(work.batches(client)) for client in range(4)] == expected
    assert limited.max_local_steps == max(expected)


@pytest.mark.parametrize("changed", ["seed", "round", "client"])
def test_batches_depend_on_seed_round_and_client(changed: str) -> None:
    assert (np.concatenate(batches(**{changed: 1})) != np.concatenate(batches())).any()


def test_generators_are_the_same_on_every_platform() -> None:
    assert generator(3, round=2, client=1, purpose="batches").integers(0, 1000, size=4).tolist() == GOLDEN_DRAW


def test_capacities_follow_the_domain() -> None:
    assert capacities_by_domain([5, 2, 1], DOMAINS, NAMES, depth=6).tolist() == [5] * 4 + [2] * 4 + [1] * 4
    assert capacities_by_domain([3], DOMAINS, NAMES, depth=6).tolist() == [3] * 12


@pytest.mark.parametrize("capacities", [[7, 2, 1], [0, 2, 1], [1, 2]])
def test_impossible_capacities_are_refused(capacities: list[int]) -> None:
    with pytest.raises(InputError, match=r"clients\.capacities: found"):
        capacities_by_domain(capacities, DOMAINS, NAMES, depth=6)


def test_ranks_follow_the_domain() -> None:
    ranks = ranks_by_domain([8, 2, 1], DOMAINS, NAMES, full=8)
    assert ranks is not None
    assert ranks.tolist() == [8] * 4 + [2] * 4 + [1] * 4
    assert ranks_by_domain([8, 8, 8], DOMAINS, NAMES, full=8) is None
    assert ranks_by_domain([], DOMAINS, NAMES, full=8) is None
    with pytest.raises(InputError, match=r"clients\.ranks: found 9, expected values from 1 to lora\.rank, 8"):
        ranks_by_domain([9], DOMAINS, NAMES, full=8)


def test_a_device_is_available_with_its_probability() -> None:
    profiles = [DeviceConfig(availability=share) for share in (0.0, 0.25, 1.0)]
    devices = devices_by_domain(profiles, DOMAINS, NAMES, seed=0)
    assert devices.of_client.tolist() == DOMAINS.tolist()
    drawn = np.array([devices.available(round) for round in range(300)])
    np.testing.assert_allclose(drawn.mean(axis=0), np.repeat([0.0, 0.25, 1.0], 4), atol=0.1)
    # Clients of a kind, and rounds, are drawn apart.
    assert len(np.unique(drawn[:, 4:8], axis=1).T) == 4
    assert len(np.unique(drawn[:, 4:8], axis=0)) > 1


def test_drawn_devices_are_of_all_kinds_and_depend_on_the_seed() -> None:
    profiles = [DeviceConfig(), DeviceConfig(upload=1.0)]
    one, again, other = (draw_devices(profiles, 100, seed) for seed in (0, 0, 1))
    assert 30 < one.of_client.sum() < 70
    assert one.of_client.tolist() == again.of_client.tolist() != other.of_client.tolist()


def test_one_per_domain_sends_one_client_of_each_domain() -> None:
    config = ClientsConfig(sampling="one_per_domain")
    seen = np.array([sample_participants(config, CLIENTS, seed=0, round=round) for round in range(40)])
    for round in seen:
        assert DOMAINS[round].tolist() == [0, 1, 2]
    assert len(np.unique(seen)) == len(CLIENTS)


def test_uniform_sampling_draws_distinct_clients() -> None:
    config = ClientsConfig(sampling="uniform", participants=7)
    drawn = sample_participants(config, CLIENTS, seed=0, round=0)
    assert len(np.unique(drawn)) == 7
    assert (np.diff(drawn) > 0).all()


def test_more_participants_than_clients_are_refused() -> None:
    with pytest.raises(InputError, match=r"clients\.participants: found 13"):
        check_sampling(ClientsConfig(sampling="uniform", participants=13), CLIENTS)
