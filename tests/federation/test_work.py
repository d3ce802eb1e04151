"""The local work of a round, its learning rate, and what becomes of bad updates."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedra_engine.config import TrainingConfig
from fedra_engine.federation.clients import Clients
from fedra_engine.federation.updates import ClientUpdate, ClientUpdates
from fedra_engine.federation.work import LocalWork, learning_rate

CLIENTS = Clients([np.arange(5), np.arange(5, 8)], np.zeros(2, dtype=np.int64), np.array([1, 1]))


def work(**training: object) -> LocalWork:
    return LocalWork(CLIENTS, np.array([0, 1]), TrainingConfig(**training), seed=0, round=3, lr=0.1)  # type: ignore[arg-type]


def test_steps_are_those_of_the_batches() -> None:
    of_both = work(batch_size=2, local_epochs=2, max_local_steps=None)
    batches = [of_both.batches(client) for client in (0, 1)]
    assert of_both.steps().tolist() == [len(mine) for mine in batches] == [6, 4]
    assert sorted(np.concatenate(batches[1]).tolist()) == [5, 5, 6, 6, 7, 7]


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [("constant", [1, 1, 1]), ("linear", [1, 0.75, 0.25]), ("cosine", [1, 0.8535534, 0.1464466])],
)
def test_learning_rates_fall_as_the_schedule_says(schedule: str, factors: list[float]) -> None:
    training = TrainingConfig(lr=0.2, lr_schedule=schedule)  # type: ignore[arg-type]
    assert [learning_rate(training, round, 4) for round in (0, 1, 3)] == pytest.approx([0.2 * f for f in factors])


def updates_of_two(*, bad: bool) -> ClientUpdates:
    """Client 8 trained two slots and a head, client 4 one slot and two heads; `bad` makes a value of client 8 NaN."""
    adapters = torch.arange(8, dtype=torch.float64).reshape(4, 2)
    if bad:
        adapters[3, 1] = torch.nan
    return ClientUpdates(
        clients=np.array([8, 4]),
        samples=np.array([2, 3]),
        processed=np.array([4, 6]),
        losses=torch.tensor([1.0, 2.0], dtype=torch.float64),
        adapters=adapters,
        slots=torch.tensor([3, 0, 1]),
        slot_owners=np.array([0, 1, 0]),
        slot_blocks=np.array([2, 2, 5]),
        heads=torch.ones(3, 1, dtype=torch.float64),
        head_rows=torch.tensor([2, 0, 1]),
        head_owners=np.array([0, 1, 1]),
        head_exits=np.array([0, 0, 1]),
    )


def check(updates: ClientUpdates) -> ClientUpdates:
    return updates.checked(torch.zeros(3, 2, dtype=torch.float64), torch.zeros(3, 1, dtype=torch.float64))


def test_norms_are_the_distance_from_what_was_handed_out() -> None:
    checked = check(updates_of_two(bad=False))
    assert checked.norms is not None
    assert checked.norms.tolist() == pytest.approx([(36 + 49 + 4 + 9 + 1) ** 0.5, (0 + 1 + 1 + 1) ** 0.5])
    assert checked.good.tolist() == [True, True]


def test_nothing_of_a_bad_update_is_left() -> None:
    checked = check(updates_of_two(bad=True))
    assert checked.good.tolist() == [False, True]
    assert checked.losses.tolist() == [0, 2]
    # Row 2 belongs to nobody.
    assert checked.adapters.tolist() == [[0, 1], [0, 0], [4, 5], [0, 0]]
    assert checked.heads.tolist() == [[1], [1], [0]]
    assert [(position, client) for position, client, _ in checked.of_good_clients()] == [(1, 4)]


def test_a_loss_that_is_not_finite_makes_an_update_bad() -> None:
    updates = updates_of_two(bad=False)
    updates.losses[1] = torch.inf
    assert check(updates).good.tolist() == [True, False]


def test_the_update_of_a_client_is_what_it_trained() -> None:
    mine = updates_of_two(bad=False).of_client(1)
    assert (mine.blocks.tolist(), mine.adapters.tolist()) == ([2], [[0, 1]])
    assert (mine.exits.tolist(), mine.heads.tolist()) == ([0, 1], [[1], [1]])


def test_a_client_that_trained_alone_owns_everything() -> None:
    update = ClientUpdate(np.array([1, 4]), torch.ones(2, 3), np.array([0, 1]), torch.zeros(2, 5))
    alone = ClientUpdates.of_one(1, update, work(), loss=2.5, processed=6)
    assert (alone.clients.tolist(), alone.samples.tolist(), alone.processed.tolist()) == ([1], [3], [6])
    assert alone.losses.tolist() == [2.5]
    returned = alone.of_client(0)
    for found, expected in zip(returned, update, strict=True):
        assert found.tolist() == expected.tolist()
