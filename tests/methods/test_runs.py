"""Whole runs of every method: either executor gives the same, and so does a run that was interrupted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedra_engine.checkpoint import latest_checkpoint
from fedra_engine.methods.registry import METHODS
from fedra_engine.reporting.run_folder import RunFolder
from tests.running import continue_run, run_experiment, small_config

SMALL: dict[str, Any] = {
    "model": {"dtype": "float64"},
    "training": {"batch_size": 4, "max_local_steps": 2, "optimizer": "sgd", "lr": 0.05},
    "clients": {"ranks": [8, 4, 2, 8, 1, 4]},
}
PRIVATE_STATE = {"fedsalora": {}, "inclusivefl": {}}
SERVER_STATE = {name: {"server": {"optimizer": name, "lr": 0.5}} for name in ("fedavgm", "fedadam", "fedyogi")}


def small_run(name: str) -> dict[str, Any]:
    same_rank = {"alllarge", "allsmall", "exclusivefl", "inclusivefl", "depthfl", "fedhello"}
    changes = {**SMALL, "method": {"name": name}}
    if name in same_rank:
        changes["clients"] = {}
    return changes


def final_tensors(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = latest_checkpoint(folder)
    assert checkpoint is not None
    return checkpoint.tensors


@pytest.mark.parametrize("name", METHODS)
def test_both_executors_give_the_same_run(name: str, tmp_path: Path) -> None:
    changes = small_run(name)
    sweep = final_tensors(run_experiment(tmp_path / "sweep", **changes))
    sequential = final_tensors(run_experiment(tmp_path / "sequential", **changes, execution={"executor": "sequential"}))
    assert sweep.keys() == sequential.keys()
    for key, tensor in sequential.items():
        torch.testing.assert_close(sweep[key], tensor, rtol=1e-8, atol=1e-10, equal_nan=True)


@pytest.mark.parametrize("changes", [{"method": {"name": n}} for n in PRIVATE_STATE] + list(SERVER_STATE.values()))
def test_what_is_remembered_survives_an_interruption(changes: dict[str, Any], tmp_path: Path) -> None:
    whole = run_experiment(tmp_path / "whole", rounds=3, **changes)
    config = small_config(tmp_path / "parts", rounds=1, **changes)
    folder = RunFolder.create(config)
    continue_run(config, folder)
    continue_run(replace(config, rounds=3), folder)
    resumed, expected = final_tensors(folder.path), final_tensors(whole)
    assert resumed.keys() == expected.keys()
    assert any(not key.startswith("state.") for key in expected)
    for key, tensor in expected.items():
        torch.testing.assert_close(resumed[key], tensor, rtol=0, atol=0, equal_nan=True)
