"""The profile of a sweep: its parts are all of a round's time, and the op is as it was afterwards."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

from benchmarks.settings import Setting, single_samples
from benchmarks.step_profile import _PARTS, measure_profile
from fedra_engine.config import ExperimentConfig
from fedra_engine.execution.sweep_model import SweepModel
from fedra_engine.federation.assignment import Assignment
from fedra_engine.runtime.errors import InputError


def few_clients() -> Setting:
    setting = single_samples(ExperimentConfig())
    few = replace(setting.work, participants=setting.work.participants[:8])
    return replace(setting, work=few, assignment=Assignment(setting.assignment.held[:8]))


def test_the_parts_are_the_whole() -> None:
    setting = few_clients()
    before = [vars(owner)[name] for owner, name, _ in _PARTS]
    started = time.process_time()
    *parts, together = measure_profile(setting, repeats=1)
    spent = time.process_time() - started
    assert together["setting"].endswith(": together")
    assert {part["setting"].split(": ")[1] for part in parts} >= {
        "frozen products",
        "attention",
        "optimizer and clipping",
    }
    assert all(part["CPU-seconds"] > 0 for part in parts)
    assert 0 < together["CPU-seconds"] < spent
    assert [vars(owner)[name] for owner, name, _ in _PARTS] == before


def test_a_model_without_whole_blocks_is_refused() -> None:
    setting = few_clients()
    foundation, samples = setting.foundation, setting.samples

    def inputs(count: int) -> dict[str, torch.Tensor]:
        return samples.inputs(torch.zeros(count, dtype=torch.int64), foundation.device, foundation.dtype)

    model = SweepModel(foundation, inputs, fuse_blocks=False)
    with pytest.raises(
        InputError, match=r"^profile: found no block of the model of embedded model.* that one op computes"
    ):
        measure_profile(replace(setting, sweep_model=model), repeats=1)
