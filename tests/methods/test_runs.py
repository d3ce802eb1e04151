"""Whole runs of every method: either executor gives the same, and so does a run that was interrupted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedra_engine.checkpoint import latest_checkpoint
from fedra_engine.config import FedHelloConfig, HetLoraConfig
from fedra_engine.errors import InputError
from fedra_engine.experiment import build_experiment
from fedra_engine.methods.registry import METHODS
from fedra_engine.reporting.run_folder import RunFolder
from tests.running import continue_run, run_experiment, small_config

SMALL: dict[str, Any] = {
    "model": {"dtype": "float64"},
    "training": {"batch_size": 4, "max_local_steps": 2, "optimizer": "sgd", "lr": 0.05},
    "clients": {"ranks": [8, 4, 2, 8, 1, 4]},
}
REMEMBERED: dict[str, dict[str, Any]] = {
    "fedsalora": {},
    "inclusivefl": {},
    "hetlora": {"hetlora": HetLoraConfig(kept_ranks=0.5)},
    "fedhello": {"fedhello": FedHelloConfig(fisher_every=1, fisher_samples=20)},
    "depthfl": {},
    "flora": {},
    "fedexlora": {},
}
"""Methods with more to remember than adapters and a classifier."""
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


@pytest.mark.parametrize(
    "changes", [{"method": {"name": n, **own}} for n, own in REMEMBERED.items()] + list(SERVER_STATE.values())
)
def test_what_is_remembered_survives_an_interruption(changes: dict[str, Any], tmp_path: Path) -> None:
    whole = run_experiment(tmp_path / "whole", rounds=3, **changes)
    config = small_config(tmp_path / "parts", rounds=1, **changes)
    folder = RunFolder.create(config)
    continue_run(config, folder)
    continue_run(replace(config, rounds=3), folder)
    resumed, expected = final_tensors(folder.path), final_tensors(whole)
    assert resumed.keys() == expected.keys()
    assert any(key not in ("state.adapters", "state.heads") for key in expected) or len(expected["state.heads"]) > 1
    for key, tensor in expected.items():
        torch.testing.assert_close(resumed[key], tensor, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("server", ["fedavg", "fedavgm", "fedadam"])
@pytest.mark.parametrize("name", ["ffalora", "rolora"])
def test_the_frozen_factor_stays_whatever_the_ranks(name: str, server: str, tmp_path: Path) -> None:
    # One round: in the second, RoLoRA trains the other factor.
    changes = {**SMALL, "rounds": 1, "method": {"name": name}, "server": {"optimizer": server}}
    experiment = build_experiment(small_config(tmp_path, **changes), torch.device("cpu"))
    before, layout = experiment.initial_state.adapters, experiment.foundation.adapter_layout
    after = final_tensors(run_experiment(tmp_path, **changes))["state.adapters"]
    frozen, trained = layout.columns("A"), layout.columns("B")
    assert torch.equal(after[:, frozen], before[:, frozen])
    assert not torch.equal(after[:, trained], before[:, trained])


DIVERGING = {"optimizer": "sgd", "lr": 1e30, "clip_norm": None, "batch_size": 4, "max_local_steps": 2}


@pytest.mark.parametrize("name", METHODS)
def test_training_that_diverges_is_bad_input(name: str, tmp_path: Path) -> None:
    changes = small_run(name) | {"training": DIVERGING, "rounds": 1}
    if name == "fedhello":
        changes["method"] = {"name": name, "fedhello": FedHelloConfig(fisher_every=1)}
    with pytest.raises(InputError, match=r"^training\.lr: found a loss or parameters that are not finite in round 0"):
        run_experiment(tmp_path, **changes)


def test_private_factors_are_left_beside_the_adapter(tmp_path: Path) -> None:
    folder = run_experiment(tmp_path, rounds=1, method={"name": "fedsalora"})
    private = load_file(folder / "adapters" / "private.safetensors")
    remembered = {name.removeprefix("method."): t for name, t in final_tensors(folder).items() if "method." in name}
    assert private.keys() == remembered.keys() != set()
    assert all(torch.equal(tensor, private[name]) for name, tensor in remembered.items())
