"""A run folder is never overwritten, repeats its experiment and forgets what a resumed run will repeat."""

import json
import math
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedra_engine.callbacks import run_folder
from fedra_engine.callbacks.fingerprint import setting_digest
from fedra_engine.callbacks.run_folder import MetricsMark, RunFolder, measuring_command
from fedra_engine.config import (
    EarlyStoppingConfig,
    ExecutionConfig,
    ExperimentConfig,
    LoraConfig,
    MethodConfig,
    TrainingConfig,
    register_choice,
)
from fedra_engine.config.parsing import read_config
from fedra_engine.runtime.errors import InputError


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


def test_a_run_killed_at_its_start_leaves_its_name_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is cleaned up, as the process is gone."""
    monkeypatch.setattr(os, "rename", lambda *_: os._exit(0))
    process = multiprocessing.get_context("fork").Process(target=RunFolder.create, args=(config(tmp_path, "first"),))
    process.start()
    process.join()
    monkeypatch.undo()
    assert len(list((tmp_path / "runs").iterdir())) == 1
    assert RunFolder.create(config(tmp_path, "first")).config_file.is_file()


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


def with_records(tmp_path: Path, rounds: int) -> tuple[RunFolder, list[MetricsMark]]:
    """A run with records of `rounds` rounds, and what the checkpoint of each remembers of them."""
    folder = RunFolder.create(config(tmp_path))
    marks = []
    for round in range(rounds):
        marks.append(folder.keep_metrics({"round": round}))
        folder.append_metrics({"round": round})
    return folder, marks


DAMAGE = {
    "edited": lambda content: content.replace(b"1}", b"7}"),
    "shortened": lambda content: content[:-1],
    "an empty line": lambda content: b"\n" + content,
    "lines swapped": lambda content: b"".join(reversed(content.splitlines(keepends=True))),
    "not UTF-8": lambda content: b"\xff" + content[1:],
    "emptied": lambda content: b"",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("kept", [True, False], ids=["kept", "metrics.jsonl"])
def test_records_come_back_from_the_file_that_has_them_as_written(
    tmp_path: Path, damage: Callable[[bytes], bytes], kept: bool
) -> None:
    folder, marks = with_records(tmp_path, 3)
    file = folder.kept_metrics_file if kept else folder.metrics_file
    file.write_bytes(damage(file.read_bytes()))
    records = folder.find_metrics(marks[-1])
    assert folder.rewind(2, records) is not kept
    assert folder.read_metrics() == [{"round": 0}, {"round": 1}, {"round": 2}]
    assert folder.kept_metrics_file.read_bytes() == folder.metrics_file.read_bytes()


def test_records_that_no_file_has_as_written_are_refused_with_file_and_line(tmp_path: Path) -> None:
    folder, marks = with_records(tmp_path, 3)
    folder.kept_metrics_file.unlink()
    folder.metrics_file.write_text('{"round": 0}\n{"round": 8}\n{"round": 2}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl: found other records than were written.* from line 1 on"):
        folder.find_metrics(marks[-1])
    folder.kept_metrics_file.write_text('{"round": 0}\n{"round": 1}\n{"round": 3}\n')
    with pytest.raises(InputError, match=r"from line 2 on; expected one of them intact"):
        folder.find_metrics(marks[-1])


@pytest.mark.parametrize("line", [b"", b"{", b"[1]", b"\xff", b"[" * 100000])
def test_a_line_that_is_no_record_is_reported(tmp_path: Path, line: bytes) -> None:
    folder, _ = with_records(tmp_path, 1)
    with folder.metrics_file.open("ab") as file:
        file.write(line + b"\n")
    with pytest.raises(InputError, match=r"metrics\.jsonl: line 2: found .*, expected the record of a round"):
        folder.read_metrics()


def test_rewinding_drops_later_rounds_and_a_line_cut_short(tmp_path: Path) -> None:
    folder, marks = with_records(tmp_path, 4)
    with folder.metrics_file.open("a") as file:
        file.write('{"round": 4, "lo')
    assert not folder.rewind(1, folder.find_metrics(marks[1]))
    assert folder.metrics_file.read_text() == '{"round": 0}\n{"round": 1}\n'
    assert folder.kept_metrics_file.read_text() == folder.metrics_file.read_text()
    assert folder.keep_metrics({"round": 2}) == marks[2]


def test_rewinding_drops_the_results_and_the_traces_of_later_rounds(tmp_path: Path) -> None:
    folder = RunFolder.create(config(tmp_path))
    folder.write_summary({"rounds": 3})
    for name in ("round_0001", "round_0002", "round_10000", "round_notes"):
        (folder.path / "trace" / name).mkdir(parents=True)
    (folder.path / "trace" / "inputs.safetensors").touch()
    for name in ("costs.json", "outcomes.json", "report.html"):
        (folder.path / name).touch()
    folder.rewind(1, b"")
    assert not {"summary.json", "costs.json", "outcomes.json", "report.html"} & {
        path.name for path in folder.path.iterdir()
    }
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
        "name": "x",
        "output_dir": "y",
        "evaluate_every": 7,
        "early_stopping": EarlyStoppingConfig(patience=3),
        "keep_best": "accuracy",
        "execution": ExecutionConfig(lanes=2),
        "model": replace(here.model, path="elsewhere"),
        "data": replace(here.data, root="elsewhere"),
    }
    assert setting_digest(replace(here, **free)) == setting_digest(here)
    constant = replace(here, training=TrainingConfig(lr_schedule="constant"))
    assert setting_digest(replace(constant, rounds=9)) == setting_digest(constant)
    growing = replace(constant, method=replace(constant.method, allocation="growing"))
    assert setting_digest(replace(growing, rounds=9)) != setting_digest(growing)
    bound = {
        # The rate of every round depends on them: see `TrainingConfig.lr_schedule`.
        "rounds": 9,
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


SETTINGS = {"method.name": "fedra", "method.allocation": None, "data.root": "PACS", "keep_best": "accuracy"}


def test_the_command_for_the_best_round_can_be_typed_as_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDRA_IMPORT", raising=False)
    expected = "fedra evaluate 'my runs/a' --best --data.validation_fraction 0"
    assert measuring_command(Path("my runs/a"), SETTINGS) == expected


@pytest.mark.parametrize("name", ["data.root", "model.path", "data.partition"])
def test_no_command_has_what_was_passed_from_python(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDRA_IMPORT", "")
    assert measuring_command(Path("a"), {**SETTINGS, name: "in-memory"}) is None


@pytest.mark.parametrize(("field", "choice"), [("method.name", "method.name"), ("keep_best", "early_stopping.measure")])
def test_names_of_ones_own_are_imported_or_unknown(
    field: str, choice: str, own_names: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {**SETTINGS, field: "mine"}
    monkeypatch.setenv("FEDRA_IMPORT", "")
    assert measuring_command(Path("a"), settings) is None
    # By a program that no command imports.
    register_choice(choice, "mine")
    assert measuring_command(Path("a"), settings) is None
    monkeypatch.setenv("FEDRA_IMPORT", "own_method own_metric")
    expected = "fedra evaluate --import=own_method --import=own_metric a --best --data.validation_fraction 0"
    assert measuring_command(Path("a"), settings) == expected
