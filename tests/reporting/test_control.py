from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fedra_engine.config import ExperimentConfig, MethodConfig
from fedra_engine.errors import InputError
from fedra_engine.reporting import control
from fedra_engine.reporting.run_folder import RunFolder

ACCURACY = {"clean": 0.9, "inverted": 0.8}


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ExperimentConfig:
    records = tmp_path / "controls.json"
    records.write_text("[]")
    monkeypatch.setattr(control, "_RECORDS", records)
    config = ExperimentConfig(output_dir=str(tmp_path), method=MethodConfig(name="alllarge"))
    folder = RunFolder.create(config)
    folder.write_summary({"rounds": config.rounds, "tuned": ACCURACY})
    control.record_control(config, folder)
    return config


def test_a_control_is_found_whatever_the_method_and_capacities(recorded: ExperimentConfig) -> None:
    other = replace(
        recorded,
        method=MethodConfig(name="fedra"),
        clients=replace(recorded.clients, capacities=[6]),
        output_dir="elsewhere",
    )
    assert control.recorded_control(other) == ACCURACY


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"rounds": 7},
        {"training": {"lr": 1.0}},
        {"data": {"min_samples": 3}},
        {"method": {"weighting": "samples"}},
    ],
)
def test_no_control_is_shown_for_another_setting(recorded: ExperimentConfig, changes: dict) -> None:
    groups = {name: replace(getattr(recorded, name), **v) for name, v in changes.items() if isinstance(v, dict)}
    assert control.recorded_control(replace(recorded, **(changes | groups))) is None


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_embedded_experiment_has_a_control(seed: int) -> None:
    assert control.recorded_control(ExperimentConfig(seed=seed)) is not None


def test_only_full_depth_runs_are_recorded(recorded: ExperimentConfig, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"method\.name: found fedra"):
        control.record_control(replace(recorded, method=MethodConfig()), RunFolder(tmp_path))


def test_unfinished_runs_are_not_recorded(recorded: ExperimentConfig, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected a finished run"):
        control.record_control(recorded, RunFolder(tmp_path))


def test_runs_that_were_to_go_on_are_not_recorded(recorded: ExperimentConfig, tmp_path: Path) -> None:
    folder = RunFolder.create(replace(recorded, name="longer"))
    folder.write_summary({"rounds": recorded.rounds - 1, "tuned": ACCURACY})
    with pytest.raises(InputError, match=r"summary\.json: found 79 rounds, expected the 80 of config\.yaml"):
        control.record_control(recorded, folder)
