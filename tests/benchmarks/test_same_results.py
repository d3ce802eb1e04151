"""Two run folders are the same to the last bit, or it is said where they differ."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.same_results import differences, report

RECORD = {"round": 0, "loss": 2.5, "seconds": 1.0, "simulated_seconds": 3.0}


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Two runs with equal results, of checkouts in different places and at different times."""
    made = tmp_path / "before", tmp_path / "after"
    for number, folder in enumerate(made):
        (folder / "adapters").mkdir(parents=True)
        tensors = {"b": torch.tensor([1.0, torch.nan, 0.0]), "a": torch.tensor(2.0, dtype=torch.bfloat16)}
        save_file(tensors, folder / "adapters/adapter_model.safetensors")
        (folder / "adapters/README.md").write_text(f"base: /checkout_{number}/model\n")
        (folder / "metrics.jsonl").write_text(json.dumps(RECORD | {"seconds": float(number)}) + "\n")
        (folder / "config.yaml").write_text("rounds: 2\n")
        (folder / "run.log").write_text(f"12:00:0{number} begun\n")
    return made


HIDDEN = (Path("/checkout_0"), Path("/checkout_1"))


def test_times_and_places_are_no_differences(folders: tuple[Path, Path]) -> None:
    assert differences(*folders, hidden=HIDDEN) == []
    assert [line.split(":")[0] for line in differences(*folders)] == ["adapters/README.md"]


def test_one_bit_of_one_tensor_is_one(folders: tuple[Path, Path]) -> None:
    file = folders[1] / "adapters/adapter_model.safetensors"
    tensors = load_file(file)
    tensors["b"].view(torch.int32)[2] ^= 1 << 31
    assert tensors["b"][2] == 0
    save_file(tensors, file)
    (line,) = differences(*folders, hidden=HIDDEN)
    assert line.startswith("adapters/adapter_model.safetensors: 1 of 2 differ, first b: ")


def test_another_dtype_is_one(folders: tuple[Path, Path]) -> None:
    file = folders[1] / "adapters/adapter_model.safetensors"
    save_file(load_file(file) | {"a": torch.tensor(2.0)}, file)
    (line,) = differences(*folders, hidden=HIDDEN)
    assert "first a: (torch.bfloat16, " in line


@pytest.mark.parametrize("side", [0, 1])
def test_a_missing_file_is_one(folders: tuple[Path, Path], side: int) -> None:
    (folders[side] / "run.log").unlink()
    assert differences(*folders, hidden=HIDDEN) == [f"run.log: only in {folders[1 - side]}"]


@pytest.mark.parametrize("change", [{"loss": 2.5000000000000004}, {"simulated_seconds": 3}, {"late": 0}])
def test_another_value_in_a_record_is_one(folders: tuple[Path, Path], change: dict[str, float]) -> None:
    (folders[1] / "metrics.jsonl").write_text(json.dumps(RECORD | change) + "\n")
    (line,) = differences(*folders, hidden=HIDDEN)
    assert line.startswith("metrics.jsonl: ")
    assert next(iter(change)) in line or "late" in change


def test_other_names_of_options_are_told_but_do_not_count(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (folders[1] / "config.yaml").write_text("turns: 2\n")
    assert report("run", *folders, ["", ""], HIDDEN)
    assert capsys.readouterr().out == (
        "run: equal\n  config.yaml: 1 of 1 differ, first line 1: rounds: 2 / turns: 2 (does not count)\n"
    )
    (folders[1] / "adapters/README.md").unlink()
    assert not report("run", *folders, ["", ""], HIDDEN)
    assert capsys.readouterr().out.startswith("run: 1 differ\n  adapters/README.md: only in ")


def test_a_run_that_fails_is_a_difference(folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert not report("run", *folders, ["", "rounds: found -1, expected 1"], HIDDEN)
    assert capsys.readouterr().out == "run: 1 differ\n  rounds: found -1, expected 1\n"
