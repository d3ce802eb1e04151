"""Whole runs of every method: either executor gives the same, and so does a run that was interrupted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fedra_engine.callbacks.run_folder import RunFolder
from fedra_engine.callbacks.saved_rounds import load_newest_intact
from fedra_engine.config import DepthFLConfig, FedHelloConfig, HetLoraConfig
from fedra_engine.execution.evaluation import FisherInformation, accuracies
from fedra_engine.experiment import build_experiment
from fedra_engine.methods.registry import METHODS
from fedra_engine.models.state import GlobalState
from fedra_engine.runtime.errors import InputError
from tests.running import continue_run, run_experiment, small_config

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_runs")]

SMALL: dict[str, Any] = {
    "model": {"dtype": "float64"},
    "training": {
        "batch_size": 4,
        "max_local_steps": 2,
        "optimizer": "sgd",
        "lr": 0.05,
        # With it, a run may be given more rounds.
        "lr_schedule": "constant",
    },
    "data": {"domains": ["clean", "noisy", "edges"], "clients_per_domain": 2},
    "clients": {"capacities": [12, 6, 3], "ranks": [8, 2, 4]},
}
EVENTFUL: dict[str, dict[str, Any]] = {
    "hetlora": {"hetlora": HetLoraConfig(keep_ratio=0.5, penalty=5.0)},
    "fedhello": {"fedhello": FedHelloConfig(fisher_every=1, fisher_samples=20)},
}
"""Options with which a method has something new to remember after every round."""
KEPT = {
    "fedsalora": "method.factors.",
    "inclusivefl": "method.momentum",
    "hetlora": "method.ranks",
    "fedhello": "method.chances",
    "flora": "state.base",
    "fedexlora": "state.base",
}
"""What checkpoints must hold besides adapters and classifiers."""
SERVER_STATE = {name: {"server": {"optimizer": name, "lr": 0.5}} for name in ("fedavgm", "fedadam", "fedyogi")}


def small_run(name: str) -> dict[str, Any]:
    same_rank = {"alllarge", "allsmall", "exclusivefl", "inclusivefl", "depthfl", "fedhello"}
    changes = {**SMALL, "method": {"name": name}}
    if name in same_rank:
        changes["clients"] = {"capacities": [12, 6, 3]}
    return changes


def final_tensors(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = load_newest_intact(folder)
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


def interrupted_and_whole(tmp_path: Path, **changes: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What two rounds leave, when they were interrupted after the first, and when not."""
    whole = run_experiment(tmp_path / "whole", rounds=2, **changes)
    config = small_config(tmp_path / "parts", rounds=1, **changes)
    folder = RunFolder.create(config)
    continue_run(config, folder)
    continue_run(replace(config, rounds=2), folder)
    return final_tensors(folder.path), final_tensors(whole)


def assert_bitwise_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", METHODS)
def test_an_interrupted_run_ends_as_a_whole_one(name: str, tmp_path: Path) -> None:
    changes = small_run(name) | {"method": {"name": name, **EVENTFUL.get(name, {})}}
    resumed, whole = interrupted_and_whole(tmp_path, **changes)
    assert name not in KEPT or any(key.startswith(KEPT[name]) for key in whole)
    assert_bitwise_equal(resumed, whole)


def test_depthfl_as_fedra_ran_it_is_the_same_by_both_executors_and_exported_whole(tmp_path: Path) -> None:
    method = {"name": "depthfl", "depthfl": DepthFLConfig(variant="fedra_paper")}
    changes = small_run("depthfl") | {"method": method}
    sweep = run_experiment(tmp_path / "sweep", **changes, trace=True)
    sequential = run_experiment(tmp_path / "sequential", **changes, execution={"executor": "sequential"})
    for key, tensor in final_tensors(sequential).items():
        torch.testing.assert_close(final_tensors(sweep)[key], tensor, rtol=1e-8, atol=1e-10)
    summary = json.loads((sweep / "summary.json").read_text())
    assert summary["evaluated_blocks"] == list(range(12))
    assert (summary["tuned_is"], summary["exported_accuracy"]) == (None, summary["tuned"])
    early = load_file(sweep / "adapters" / "exits.safetensors")
    assert {name.rpartition(".")[0] for name in early} == {"exits.0", "exits.1", "exits.2"}
    # One client for each domain, of 12, 6 and 3 blocks.
    updates = [load_file(file).keys() for file in sorted((sweep / "trace" / "round_0000").glob("client_*"))]
    assert [sorted(name for name in update if name.endswith("weight")) for update in updates] == [
        ["exits.0.weight", "exits.1.weight", "exits.2.weight", "head.weight"],
        ["exits.0.weight", "head.weight"],
        ["head.weight"],
    ]


@pytest.mark.parametrize("name", ["fedra", "hetlora"])
def test_how_adapters_move_survives_an_interruption(name: str, tmp_path: Path) -> None:
    resumed, whole = interrupted_and_whole(
        tmp_path, **small_run(name) | {"method": {"name": name, "allocation": "importance"}}
    )
    assert (whole["method.movement"] > 0).any()
    assert_bitwise_equal(resumed, whole)


@pytest.mark.parametrize("server", SERVER_STATE)
def test_moments_of_the_server_survive_an_interruption(server: str, tmp_path: Path) -> None:
    resumed, whole = interrupted_and_whole(tmp_path, **SERVER_STATE[server], training={"lr_schedule": "constant"})
    assert "server.adapters.first" in whole
    assert_bitwise_equal(resumed, whole)


def test_fisher_information_is_that_of_the_state_which_is_handed_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []

    def scores(self: FisherInformation, state: GlobalState, count: int, round: int) -> np.ndarray:
        measured.append(state.adapters.clone())
        return np.arange(12.0)

    monkeypatch.setattr(FisherInformation, "__call__", scores)
    changes = {"method": {"name": "fedhello", **EVENTFUL["fedhello"]}, "server": {"optimizer": "fedadam"}}
    folder = run_experiment(tmp_path, rounds=1, **changes)
    assert torch.equal(measured[0], final_tensors(folder)["state.adapters"])


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


DIVERGING = {
    "optimizer": "sgd",
    "lr": 1e30,
    "clip_norm": None,
    "batch_size": 4,
    "max_local_steps": 2,
    # Where one factor is frozen, the updates of some clients stay finite.
    "on_bad_update": "error",
}


@pytest.mark.parametrize("name", METHODS)
def test_training_that_diverges_is_bad_input(name: str, tmp_path: Path) -> None:
    changes = small_run(name) | {"training": DIVERGING, "rounds": 1}
    if name == "fedhello":
        changes["method"] = {"name": name, "fedhello": FedHelloConfig(fisher_every=1)}
    with pytest.raises(InputError, match=r"^training\.on_bad_update: found .* not finite in round 1 from client"):
        run_experiment(tmp_path, **changes)


def test_private_factors_are_left_beside_the_adapter(tmp_path: Path) -> None:
    folder = run_experiment(tmp_path, rounds=1, method={"name": "fedsalora"})
    private = load_file(folder / "adapters" / "private.safetensors")
    remembered = {name.removeprefix("method."): t for name, t in final_tensors(folder).items() if "method." in name}
    assert private.keys() == remembered.keys() != set()
    assert all(torch.equal(tensor, private[name]) for name, tensor in remembered.items())


def test_a_domain_without_clients_is_predicted_by_what_a_newcomer_gets(tmp_path: Path) -> None:
    """As where clients mix domains: each counts as one of the domain of most of its samples."""
    config = small_config(
        tmp_path,
        rounds=1,
        data={"domains": ["clean", "noisy", "edges"], "partition": "iid", "clients": 2},
        clients={"sampling": "uniform", "capacities": [12]},
        method={"name": "fedsalora"},
    )
    folder = RunFolder.create(config)
    continue_run(config, folder)
    (record,) = folder.read_metrics()
    experiment = build_experiment(config, torch.device("cpu"))
    (empty, *_) = set(range(3)) - set(experiment.clients.domains.tolist())
    tensors = {name.removeprefix("state."): tensor for name, tensor in final_tensors(folder.path).items()}
    state = experiment.initial_state.restored(tensors)
    shared = accuracies(experiment.evaluator.scores(state, experiment.method.evaluated_model()))
    name = experiment.domains[empty]
    assert record["accuracy"].keys() == shared.keys()
    assert record["accuracy"][name] == shared[name]
