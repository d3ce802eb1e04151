"""A run folder is never overwritten, repeats its experiment and forgets what a resumed run will repeat."""

import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from fedra_engine.cli import read_config
from fedra_engine.config import (
    ExecutionConfig,
    ExperimentConfig,
    LoraConfig,
    MethodConfig,
    TrainingConfig,
)
from fedra_engine.config_comparison import setting_digest
from fedra_engine.errors import InputError
from fedra_engine.reporting import run_folder
from fedra_engine.reporting.run_folder import RunFolder


def config(tmp_path: Path, name: str | None = None) -> ExperimentConfig:
    return ExperimentConfig(
        rounds=3,
        name=name,
        output_dir=str(tmp_path / "runs"),
        lora=LoraConfig(target_modules="o_proj|fc2"),
        training=TrainingConfig(lr=1e-5, clip_norm=None, betas=(0.8, 0.9)),
    )


def test_an_existing_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    folder = RunFolder.create(config(tmp_path, "first"))
    folder.append_metrics({"round": 0})
    with pytest.raises(InputError, match=r"name: found a run in .*first, expected a new name"):
        RunFolder.create(config(tmp_path, "first"))
    assert folder.read_metrics() == [{"round": 0}]


def test_runs_without_a_name_get_folders_of_their_own(tmp_path: Path) -> None:
    paths = {RunFolder.create(config(tmp_path)).path for _ in range(3)}
    assert len(paths) == 3
    assert all(path.name.startswith("fedra-digits_vit-") for path in paths)


def test_runs_that_begin_at_the_same_moment_never_share_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder.time, "strftime", lambda _: "now")
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(RunFolder.create, [config(tmp_path)] * 16))
    numbers = ["", *(f"-{number}" for number in range(2, 17))]
    assert {folder.path.name for folder in folders} == {f"fedra-digits_vit-now{number}" for number in numbers}


@pytest.mark.parametrize("name", ["first", None])
@pytest.mark.parametrize("kind", ["file", "dangling link"])
def test_a_folder_that_cannot_be_made_is_reported(tmp_path: Path, name: str | None, kind: str) -> None:
    if kind == "file":
        (tmp_path / "runs").write_text("a file")
    else:
        (tmp_path / "runs").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"output_dir: cannot make .*; expected a writable folder"):
        RunFolder.create(config(tmp_path, name))


def test_config_yaml_gives_the_same_experiment_without_the_name(tmp_path: Path) -> None:
    folder = RunFolder.create(config(tmp_path, "first"))
    assert read_config(folder.config_file) == config(tmp_path)


def test_metrics_are_one_json_object_a_line_and_there_at_once(tmp_path: Path) -> None:
    folder = RunFolder.create(config(tmp_path))
    folder.append_metrics({"round": 0, "loss": 1.5})
    folder.append_metrics({"round": 1, "loss": 1.25})
    lines = folder.metrics_file.read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"round": 0, "loss": 1.5}, {"round": 1, "loss": 1.25}]


def test_rewinding_drops_later_rounds_and_a_line_cut_short(tmp_path: Path) -> None:
    folder = RunFolder.create(config(tmp_path))
    for round in range(4):
        folder.append_metrics({"round": round})
    with folder.metrics_file.open("a") as file:
        file.write('{"round": 4, "lo')
    folder.rewind(1)
    assert folder.metrics_file.read_text() == '{"round": 0}\n{"round": 1}\n'
    folder.rewind(-1)
    assert folder.read_metrics() == []


def test_rewinding_drops_the_summary_and_the_traces_of_later_rounds(tmp_path: Path) -> None:
    folder = RunFolder.create(config(tmp_path))
    folder.write_summary({"rounds": 3})
    for name in ("round_0001", "round_0002", "round_10000", "round_notes"):
        (folder.path / "trace" / name).mkdir(parents=True)
    (folder.path / "trace" / "inputs.safetensors").touch()
    folder.rewind(1)
    assert not folder.summary_file.exists()
    kept = sorted(path.name for path in (folder.path / "trace").iterdir())
    assert kept == ["inputs.safetensors", "round_0001", "round_notes"]


def test_numbers_that_json_does_not_have_are_refused(tmp_path: Path) -> None:
    folder = RunFolder.create(config(tmp_path))
    with pytest.raises(ValueError, match="JSON compliant"):
        folder.append_metrics({"loss": math.nan})
    with pytest.raises(ValueError, match="JSON compliant"):
        folder.write_summary({"average_tuned": math.inf})
    assert not folder.summary_file.exists()
    assert folder.read_metrics() == []


def test_the_setting_is_all_but_what_may_change_when_a_run_goes_on(tmp_path: Path) -> None:
    here = config(tmp_path)
    free = {
        "rounds": 9,
        "name": "x",
        "output_dir": "y",
        "evaluate_every": 7,
        "execution": ExecutionConfig(lanes=2),
    }
    assert setting_digest(replace(here, **free)) == setting_digest(here)
    bound = {
        "method": MethodConfig(weighting="samples"),
        "seed": 1,
        "trace": True,
        "lora": LoraConfig(rank=2),
        "training": TrainingConfig(lr=1e-6),
    }
    digests = {setting_digest(replace(here, **{name: value})) for name, value in bound.items()}
    assert len(digests - {setting_digest(here)}) == len(bound)


def test_only_the_folder_of_a_run_opens(tmp_path: Path) -> None:
    folder = RunFolder.create(config(tmp_path, "first"))
    assert RunFolder.open(folder.path).path == folder.path
    with pytest.raises(InputError, match=r"found no config\.yaml, expected the folder of an earlier run"):
        RunFolder.open(tmp_path)


def test_the_summary_replaces_the_one_before(tmp_path: Path) -> None:
    folder = RunFolder.create(config(tmp_path))
    folder.write_summary({"rounds": 1})
    folder.write_summary({"rounds": 2})
    assert json.loads(folder.summary_file.read_text()) == {"rounds": 2}
    assert sorted(path.name for path in folder.path.iterdir()) == ["config.yaml", "summary.json"]
