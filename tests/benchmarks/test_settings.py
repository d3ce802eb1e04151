"""The benchmarks' settings are the work that their names tell."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from benchmarks.settings import Setting, single_samples, tiny_vit
from fedra_engine.config import ExperimentConfig


@pytest.mark.parametrize("make", [tiny_vit, lambda: single_samples(ExperimentConfig())])
def test_clients_take_as_many_steps_of_as_many_samples_as_the_name_tells(make: Callable[[], Setting]) -> None:
    setting = make()
    named = re.search(r"(\d+)(?: clients)? × (\d+) × (\d+)", setting.name)
    assert named is not None
    clients, steps, batch = map(int, named.groups())
    assert setting.work.steps().tolist() == [steps] * clients
    assert {len(rows) for rows in setting.work.batches(clients - 1)} == {batch}
