"""The CPU threads of a step and of an evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedra_engine.config import LoraConfig
from fedra_engine.execution.evaluation import Evaluator
from fedra_engine.execution.sweep_model import SweepModel
from fedra_engine.execution.threads import limit_threads, worthwhile_threads
from fedra_engine.models.state import EvaluatedModel
from tests.tiny import DEPTH, make_samples, make_tiny
from tests.tiny_federation import ADAMW, make_setting

CPU = torch.device("cpu")


@pytest.fixture
def kept_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_largest_product_decides() -> None:
    block = nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 500), nn.Linear(500, 100))
    assert worthwhile_threads(block, tokens=10) == 1
    # 2 · 4,000 · 100 · 500 = 4e8 floating-point operations.
    assert worthwhile_threads(block, tokens=4000) == 4


@pytest.mark.usefixtures("kept_threads")
def test_small_steps_use_one_thread_and_large_ones_those_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    foundation = make_tiny("vit", LoraConfig(target_modules=["fc1"]))
    torch.set_num_threads(2)
    limit_threads(foundation, tokens=10**9)
    assert torch.get_num_threads() == 2
    limit_threads(foundation, tokens=10)
    assert torch.get_num_threads() == 1


@pytest.mark.usefixtures("kept_threads")
def test_a_given_number_of_threads_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    torch.set_num_threads(2)
    limit_threads(make_tiny("vit", LoraConfig(target_modules=["fc1"])), tokens=10)
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("kept_threads")
def test_a_small_experiment_leaves_the_next_one_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    foundation = make_tiny("vit", LoraConfig(target_modules=["fc1"]))
    torch.set_num_threads(2)
    limit_threads(foundation, tokens=10)
    limit_threads(foundation, tokens=10**9)
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("kept_threads")
def test_evaluation_has_the_threads_that_its_own_batches_keep_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    # The tiny model's products would keep one thread busy.
    monkeypatch.setattr("fedra_engine.execution.threads._FLOPS_PER_THREAD", 1000)
    setting, samples, used = make_setting("vit", ADAMW), make_samples("vit", 5), list[int]()
    model = SweepModel(setting.foundation, lambda count: samples.inputs(torch.arange(count), CPU, torch.float64))
    features_of = model.features_of

    def observed(*args: Any, **kwargs: Any) -> Tensor:
        used.append(torch.get_num_threads())
        return features_of(*args, **kwargs)

    monkeypatch.setattr(model, "features_of", observed)
    torch.set_num_threads(3)
    limit_threads(setting.foundation, tokens=0)
    evaluator = Evaluator(setting.foundation, model, samples, ["only"])
    evaluator.scores(setting.state(), EvaluatedModel(np.arange(DEPTH)))
    assert (used, torch.get_num_threads()) == ([3], 1)
    limit_threads(setting.foundation, tokens=10**9)
    assert torch.get_num_threads() == 3
