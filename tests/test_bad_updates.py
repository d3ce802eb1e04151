"""A round in which some updates are not finite is the round in which their clients do not take part."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedra_engine.callbacks.run_folder import RunFolder
from fedra_engine.callbacks.saved_rounds import load_newest_intact
from fedra_engine.config import DepthFLConfig, FedHelloConfig, HetLoraConfig
from fedra_engine.experiment import Experiment
from fedra_engine.federation.records import ReturnedUpdates
from fedra_engine.federation.updates import ClientUpdates
from fedra_engine.methods.registry import METHODS
from fedra_engine.runtime.errors import InputError
from tests.distributed.test_equal_runs import changes, shallow_model
from tests.distributed.worker import leave_out_what_takes_long
from tests.running import continue_run, run_experiment, small_config, spoil

OPTIONS: dict[str, dict[str, Any]] = {
    "depthfl": {"depthfl": DepthFLConfig(exit_every=2)},
    "fedhello": {"fedhello": FedHelloConfig(fisher_every=1, fisher_samples=20)},
    "hetlora": {"hetlora": HetLoraConfig(keep_ratio=0.5, penalty=0.5)},
}
"""So that there is something to remember of a client, or to learn from it, in the first round."""
SERVERS = {"depthfl": "fedavgm"}
"""Its momentum must not see the classifier that nobody trained."""
LONE_HOLDERS = (0, 1)
"""The clients that hold more than two of the four blocks."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shallow_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        leave_out_what_takes_long(patch.setattr)
        yield


def absent(patch: pytest.MonkeyPatch, clients: tuple[int, ...], rounds: tuple[int, ...]) -> None:
    """Let these clients not take part in these rounds."""
    assigned_work = Experiment.assigned_work

    def without(self: Experiment, round: int) -> Any:
        work, assignment = assigned_work(self, round)
        rest = np.flatnonzero(~np.isin(work.participants, clients if round in rounds else ()))
        return replace(work, participants=work.participants[rest]), assignment.select(rest)

    patch.setattr(Experiment, "assigned_work", without)


def final_tensors(run: Path) -> dict[str, Tensor]:
    found = load_newest_intact(run)
    assert found is not None
    return found.tensors


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize(("name", "server"), [(name, SERVERS.get(name, "fedavg")) for name in METHODS])
def test_a_round_with_bad_updates_is_one_without_their_clients(
    name: str, server: str, tmp_path: Path, model: Path
) -> None:
    case = changes({"name": name, **OPTIONS.get(name, {})}, model, server={"optimizer": server}, evaluate_every=2)
    if name == "flexlora":
        # Products of a lower rank than the adapters leave some directions of a decomposition to the rounding.
        case["clients"] = {**case["clients"], "ranks": []}
    case["training"] = {**case["training"], "max_local_steps": 2}
    case["rounds"] = 2 if name in {*OPTIONS, "fedsalora", "inclusivefl", "rolora"} else 1
    # Of all clients, only those that hold all blocks take part in exclusivefl.
    bad = LONE_HOLDERS[: 1 if name == "exclusivefl" else 2]
    with pytest.MonkeyPatch.context() as patch:
        absent(patch, bad, rounds=(0,))
        expected = run_experiment(tmp_path / "without", **case)
    with pytest.MonkeyPatch.context() as patch:
        spoil(patch.setattr, bad, rounds=(0,))
        sweep = run_experiment(tmp_path / "sweep", **case, execution={"lanes": 3})
        sequential = run_experiment(tmp_path / "sequential", **case, execution={"executor": "sequential"})
    for found in (sweep, sequential):
        assert_close(final_tensors(found), final_tensors(expected), 1e-9)
    records = [RunFolder(run).read_metrics() for run in (expected, sequential, sweep)]
    for first, *others in zip(*records, strict=True):
        for other in others:
            assert other.pop("bad_updates", 0) == (len(bad) if other["round"] == 0 else 0)
            assert other.pop("bad_clients", []) == (list(bad) if other["round"] == 0 else [])
            for record in (first, other):
                record.pop("seconds", None)
            rounded = [name for name in ("loss", "test_loss", "macro_f1", "calibration_error") if name in first]
            for name in rounded:
                assert other.pop(name) == pytest.approx(first[name], rel=1e-8)
            assert other == {key: value for key, value in first.items() if key not in rounded}


def plain(model: Path, **more: Any) -> dict[str, Any]:
    return changes({"name": "fedra"}, model, evaluate_every=2, **more)


def test_deterministic_sums_do_not_notice_bad_updates(tmp_path: Path, model: Path) -> None:
    case = plain(model, execution={"deterministic": True, "lanes": 1})
    with pytest.MonkeyPatch.context() as patch:
        absent(patch, LONE_HOLDERS, rounds=(0, 1))
        expected = run_experiment(tmp_path / "without", **case)
    with pytest.MonkeyPatch.context() as patch:
        spoil(patch.setattr, LONE_HOLDERS, rounds=(0, 1))
        found = run_experiment(tmp_path / "spoilt", **case)
    assert_close(final_tensors(found), final_tensors(expected), 0)


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def test_each_round_says_once_who_is_left_out(
    tmp_path: Path,
    model: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spoil(monkeypatch.setattr, (1, 4), rounds=(1,))
    run = run_experiment(tmp_path, **plain(model))
    warning = "round 2 leaves out clients 1 (clean), 4 (edges): a loss, gradient or parameter is not finite"
    assert warnings_in(caplog) == [warning]
    lines = capsys.readouterr().out.splitlines()
    assert [line.endswith("2 left out") for line in lines if line.startswith("round ")] == [False, True]
    assert (run / "run.log").read_text().count(warning) == 1
    first, second = RunFolder(run).read_metrics()
    assert (second["bad_updates"], second["bad_clients"], second["participants"]) == (2, [1, 4], 4)
    assert "bad_updates" not in first
    assert np.isfinite(second["loss"])


@pytest.mark.parametrize(
    ("mode", "bad", "named"),
    [("drop", range(6), "clients 0 (clean), 1 (clean), 2 (noisy)"), ("error", (3,), "from client 3 (noisy),")],
)
def test_the_run_ends_where_nobody_is_left_or_nobody_may_be_left_out(
    mode: str, bad: tuple[int, ...], named: str, tmp_path: Path, model: Path
) -> None:
    case = plain(model)
    case["training"] = {**case["training"], "on_bad_update": mode}
    config = small_config(tmp_path, **case)
    folder = RunFolder.create(config)
    with pytest.MonkeyPatch.context() as patch:
        spoil(patch.setattr, bad, rounds=(1,))
        with pytest.raises(InputError, match=r"^training\.on_bad_update: found .* in round 2 ") as raised:
            continue_run(config, folder)
    message = str(raised.value)
    assert named in message
    assert all(cause in message for cause in ("training.lr", "float16", "inputs"))
    assert [record["round"] for record in folder.read_metrics()] == [0]
    # The round before is kept, and the run can go on.
    continue_run(config, folder)
    assert [record["round"] for record in folder.read_metrics()] == [0, 1]


def test_a_run_that_goes_on_after_a_bad_update_ends_as_a_whole_one(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch.setattr, LONE_HOLDERS, rounds=(1,))
    case = changes({"name": "fedsalora"}, model, evaluate_every=3)
    whole = run_experiment(tmp_path / "whole", rounds=3, **case)
    config = small_config(tmp_path / "parts", rounds=2, **case)
    folder = RunFolder.create(config)
    continue_run(config, folder)
    continue_run(replace(config, rounds=3), folder)
    assert_close(final_tensors(folder.path), final_tensors(whole), 0)


def test_updates_far_larger_than_the_others_are_pointed_out_and_taken(
    tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = ClientUpdates.checked

    def enlarged(self: ClientUpdates, starts: Tensor, head_starts: Tensor, **rows: Tensor | None) -> ClientUpdates:
        mine = torch.from_numpy(self.clients[self.slot_owners] == 2)
        self.adapters[self.slots[mine]] += 100
        return checked(self, starts, head_starts, **rows)

    monkeypatch.setattr(ClientUpdates, "checked", enlarged)
    run = run_experiment(tmp_path, rounds=1, **plain(model))
    (warning,) = warnings_in(caplog)
    assert warning.startswith("round 1 has updates of more than 10 times the median norm, ")
    assert warning.endswith(", from client 2 (noisy)")
    (record,) = RunFolder(run).read_metrics()
    assert record["participants"] == 6
    assert final_tensors(run)["state.adapters"].abs().max() > 10


@pytest.mark.parametrize(
    ("norms", "far"),
    [
        ([1.0, 1.0, 1.0, 11.0], [3]),
        ([1.0, 1.0, 1.0, 9.0], []),
        ([1.0, 1.0, 11.0], []),
        ([0.0, 0.0, 0.0, 5.0], []),
        ([1.0, 1.0, np.nan, 11.0], []),
        ([1.0, np.inf, 1.0, 1.0, 11.0], [4]),
    ],
    ids=["far", "near", "too few", "nobody else moved", "too few that are finite", "beside a bad one"],
)
def test_suspicious_updates_are_found_by_the_median_of_the_finite_ones(norms: list[float], far: list[int]) -> None:
    numbers = np.arange(len(norms))
    assert ReturnedUpdates(numbers, numbers, np.array(norms)).suspicious()[0].tolist() == far


def test_many_bad_clients_are_counted_but_not_all_named(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("fedra_engine.experiment._MOST_NAMED", 2)
    monkeypatch.setattr("fedra_engine.simulation.MOST_RECORDED", 3)
    spoil(monkeypatch.setattr, range(5), rounds=(0,))
    run = run_experiment(tmp_path, rounds=1, **plain(model))
    assert "leaves out clients 0 (clean), 1 (clean) and 3 others: " in caplog.text
    (record,) = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert (record["bad_updates"], record["bad_clients"]) == (5, [0, 1, 2])
