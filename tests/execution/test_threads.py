"""CPU threads follow the size of a step."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from fedra_engine.config import LoraConfig
from fedra_engine.execution.threads import limit_threads, worthwhile_threads
from tests.tiny import make_tiny


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_largest_product_decides() -> None:
    block = nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 500), nn.Linear(500, 100))
    assert worthwhile_threads(block, tokens=10) == 1
    # 2 · 4,000 · 100 · 500 = 4e8 floating-point operations.
    assert worthwhile_threads(block, tokens=4000) == 4


def test_small_steps_use_one_thread_and_large_ones_those_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    foundation = make_tiny("vit", LoraConfig(target_modules=["fc1"]))
    torch.set_num_threads(2)
    limit_threads(foundation, tokens=10**9)
    assert torch.get_num_threads() == 2
    limit_threads(foundation, tokens=10)
    assert torch.get_num_threads() == 1


def test_a_given_number_of_threads_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    torch.set_num_threads(2)
    limit_threads(make_tiny("vit", LoraConfig(target_modules=["fc1"])), tokens=10)
    assert torch.get_num_threads() == 2


def test_a_small_experiment_leaves_the_next_one_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    foundation = make_tiny("vit", LoraConfig(target_modules=["fc1"]))
    torch.set_num_threads(2)
    limit_threads(foundation, tokens=10)
    limit_threads(foundation, tokens=10**9)
    assert torch.get_num_threads() == 2
