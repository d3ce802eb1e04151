"""Checkpoints come back as they were saved, and never in part."""

import json
import math
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedra_engine.callbacks.saved_rounds import load_newest_intact, save_checkpoint
from fedra_engine.runtime.errors import InputError

TENSORS = {"adapters": torch.arange(6.0).reshape(2, 3), "head": torch.tensor([1, 2], dtype=torch.int64)}


def folders(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_tensors_and_state_come_back(tmp_path: Path) -> None:
    bank = torch.arange(12.0, dtype=torch.float64).reshape(3, 4)
    tensors = {**TENSORS, "view": bank[1], "transposed": bank.T, "half": torch.ones(2, dtype=torch.bfloat16)}
    state = {"accuracy": {"clean": 0.5}, "rounds": [1, 2]}
    path = save_checkpoint(tmp_path, 7, tensors, state)
    assert path == tmp_path / "checkpoints" / "round_0007"
    found = load_newest_intact(tmp_path)
    assert found is not None
    assert (found.round, found.state) == (7, state)
    assert found.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert torch.equal(found.tensors[name], tensor)


def test_a_run_without_checkpoints_has_no_latest(tmp_path: Path) -> None:
    assert load_newest_intact(tmp_path) is None


def test_the_newest_two_stay(tmp_path: Path) -> None:
    for round in (8, 9, 10, 9999, 10000):
        save_checkpoint(tmp_path, round, TENSORS, {})
    assert folders(tmp_path) == ["round_10000", "round_9999"]
    found = load_newest_intact(tmp_path)
    assert found is not None
    assert found.round == 10000


def killed_before_rename(run: Path) -> None:
    os.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    save_checkpoint(run, 1, TENSORS, {"round": 1})


def test_a_process_killed_while_saving_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 0, TENSORS, {"round": 0})
    process = multiprocessing.get_context("fork").Process(target=killed_before_rename, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == -9
    assert len(folders(tmp_path)) == 2
    found = load_newest_intact(tmp_path)
    assert found is not None
    assert found.state == {"round": 0}
    save_checkpoint(tmp_path, 1, TENSORS, {"round": 1})
    assert folders(tmp_path) == ["round_0000", "round_0001"]


@pytest.mark.parametrize("file", ["state.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "remove"])
def test_damage_is_reported_with_the_file(tmp_path: Path, file: str, damage: str) -> None:
    path = save_checkpoint(tmp_path, 3, TENSORS, {}) / file
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[:-2])
    elif damage == "flip":
        path.write_bytes(bytes([content[0] ^ 255]) + content[1:-1] + bytes([content[-1] ^ 1]))
    else:
        path.unlink()
    with pytest.raises(InputError, match=rf"round_0003/{file}: found .*, expected an intact checkpoint"):
        load_newest_intact(tmp_path)


EDITS = {
    "an accuracy": lambda header: header["state"]["accuracy"].update(clean=0.75),
    "a missing key": lambda header: header["state"].pop("accuracy"),
    "another type": lambda header: header.update(state=[1]),
    "no digest": lambda header: header.pop("digest"),
    "no tensors": lambda header: header.pop("tensors"),
    "NaN": lambda header: header["state"].update(accuracy={"clean": math.nan}),
    "a huge number": lambda header: header["state"].update(accuracy={"clean": 10**400}),
    "null": lambda header: header.update(round=None),
    "another version": lambda header: header.update(version=1),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_an_edited_state_is_found(tmp_path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    file = save_checkpoint(tmp_path, 3, TENSORS, {"accuracy": {"clean": 0.5}}) / "state.json"
    header = json.loads(file.read_text())
    edit(header)
    file.write_text(json.dumps(header))
    with pytest.raises(InputError, match=r"round_0003/state\.json: found "):
        load_newest_intact(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b"\0", b"\xff\xfe", b"null", b"3", b"[]", b"[[1]]", b'"text"', b"{}", b"1" * 5000, b"[" * 100_000],
)
def test_a_state_that_is_none_is_found(tmp_path: Path, content: bytes) -> None:
    (save_checkpoint(tmp_path, 3, TENSORS, {}) / "state.json").write_bytes(content)
    with pytest.raises(InputError, match=r"round_0003/state\.json: found [^\n]*$"):
        load_newest_intact(tmp_path)


def test_the_spare_serves_when_the_newest_is_damaged(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 3, TENSORS, {"of": 3})
    (save_checkpoint(tmp_path, 4, TENSORS, {"of": 4}) / "state.safetensors").write_bytes(b"")
    found = load_newest_intact(tmp_path)
    assert found is not None
    assert (found.round, found.state) == (3, {"of": 3})
    assert "round_0004/state.safetensors: found other bytes" in found.passed_over


def test_a_repeated_round_replaces_its_damaged_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 3, TENSORS, {"of": 3})
    (save_checkpoint(tmp_path, 4, TENSORS, {"of": 4}) / "state.safetensors").write_bytes(b"")
    save_checkpoint(tmp_path, 4, TENSORS, {"of": 4, "again": True})
    assert folders(tmp_path) == ["round_0003", "round_0004"]
    found = load_newest_intact(tmp_path)
    assert found is not None
    assert (found.round, found.state) == (4, {"of": 4, "again": True})


def test_a_checkpoint_in_the_folder_of_another_round_is_not_intact(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 3, TENSORS, {})
    path.rename(path.with_name("round_0007"))
    with pytest.raises(
        InputError, match=r"state\.json: found the state of round_0003, expected an intact .* of round_0007"
    ):
        load_newest_intact(tmp_path)


def test_files_and_folders_of_other_names_are_left_alone(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 3, TENSORS, {})
    (tmp_path / "checkpoints" / "round_0009.bak").mkdir()
    (tmp_path / "checkpoints" / "round_0010").write_text("a file")
    found = load_newest_intact(tmp_path)
    assert found is not None
    assert found.round == 3
    save_checkpoint(tmp_path, 4, TENSORS, {})
    assert folders(tmp_path) == ["round_0003", "round_0004", "round_0009.bak", "round_0010"]
