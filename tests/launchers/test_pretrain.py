"""The `pretrain` launcher, from command line to model directory."""

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import SafetensorError
from transformers import AutoModelForImageClassification


def test_a_model_directory_is_made_once(
    launch: Callable[..., object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--epochs=1", "--blocks=2", "--batch_size=477", f"--output_dir={tmp_path}/model"]
    assert launch("pretrain", *options) == 0
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "model").config.num_hidden_layers == 2
    card = tmp_path / "model" / "README.md"
    assert "--batch_size 477" in card.read_text()
    card.write_text("mine")
    assert launch("pretrain", *options) == 2
    assert capsys.readouterr().err.startswith(f"error: output_dir: found files in {tmp_path}/model, expected")
    assert card.read_text() == "mine"


def test_a_full_disk_is_one_line_and_leaves_room_for_another_try(
    launch: Callable[..., object], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", fill)
    options = ["--epochs=1", "--blocks=2", "--batch_size=477", f"--output_dir={tmp_path}/model"]
    assert launch("pretrain", *options) == 1
    assert f"error: {tmp_path}/model: found no space left on device" in capsys.readouterr().err.splitlines()[-1]
    assert not list((tmp_path / "model").iterdir())
