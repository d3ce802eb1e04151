"""The Python in a model card runs as it stands, and makes of an image or a text what the run made of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from torch import Tensor

from fedra_engine import Result, simulate
from tests.data.tokenizers import WORDS, save_decoder_tokenizer, save_encoder_tokenizer
from tests.running import small_config
from tests.tiny import CLASSES, make_model

NAMES = [f"class {label}" for label in range(CLASSES + 2)]
"""More than the base model has."""
LETTERS = "abcdefghijklmnop"


def images(folder: Path, dtype: str) -> Result:
    few: dict[str, Any] = {"domains": ["clean", "inverted"], "clients_per_domain": 1}
    return simulate(
        small_config(folder, data=few, clients={"capacities": [12]}, model={"dtype": dtype}, rounds=1), quiet=True
    )


def texts(folder: Path, dtype: str, *, answers: bool = False) -> Result:
    """Of an encoder that classifies, or with `answers` a decoder that continues."""
    model = make_model("llama_lm" if answers else "bert")
    model.resize_token_embeddings(len(WORDS))
    model.save_pretrained(folder / "base")
    (save_decoder_tokenizer if answers else save_encoder_tokenizer)(folder / "base")
    source = "causal_lm" if answers else "text_classification"
    rows: dict[str, Any] = {"text": [" ".join(LETTERS[row % 9 :]) for row in range(70)]}
    features: dict[str, Any] = {"text": Value("string")}
    if not answers:
        rows["label"] = [row % len(NAMES) for row in range(70)]
        features["label"] = ClassLabel(names=NAMES)
    config = small_config(
        folder,
        data={"source": source, "partition": "iid", "clients_per_domain": 2, "min_samples": 1, "max_length": 8},
        model={"path": str(folder / "base"), "dtype": dtype},
        lora={"target_modules": ["q_proj"] if answers else ["query"]},
        clients={"capacities": [4]},
        rounds=1,
    )
    return simulate(config, dataset=Dataset.from_dict(rows, features=Features(features)), quiet=True)


def cards(result: Result) -> list[Path]:
    """Those of a run's adapter and of its merged model."""
    result.save_model(result.folder / "model")
    return [result.folder / name / "README.md" for name in ("adapters", "model")]


def code_of(card: Path) -> str:
    """The Python that loads what the card is of."""
    found = re.search(r"```python\n(.*?)```", card.read_text(), flags=re.DOTALL)
    assert found is not None
    return found[1]


def first_inputs(result: Result) -> dict[str, Tensor]:
    """What the run made of its first training sample."""
    samples = result.experiment.train_samples
    return samples.inputs(torch.arange(1), torch.device("cpu"), result.experiment.foundation.dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_image(
    tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = images(tmp_path, dtype)
    pixels = first_inputs(result)["pixel_values"]
    own = ((pixels[0, 0].float() * 0.5 + 0.5) * 255).round().to(torch.uint8).numpy()
    for card in cards(result):
        monkeypatch.chdir(card.parent)
        exec(code_of(card), {})
        assert capsys.readouterr().out.splitlines()[-1] in result.experiment.train_data.classes
        names: dict[str, Any] = {"own": own}
        exec(code_of(card).replace('Image.new("L", (8, 8))', "Image.fromarray(own)"), names)
        torch.testing.assert_close(names["inputs"]["pixel_values"], pixels)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_text(
    tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also a long one, with a base model for another number of classes."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    result = texts(tmp_path, dtype)
    expected, own = first_inputs(result), result.experiment.train_data.content["text"][0]
    for card in cards(result):
        monkeypatch.chdir(card.parent)
        exec(code_of(card), {})
        assert capsys.readouterr().out.splitlines()[-1] in NAMES
        names: dict[str, Any] = {}
        exec(code_of(card).replace("a text of yours", own), names)
        found = {name: tensor.tolist() for name, tensor in names["inputs"].items()}
        assert found == {name: tensor.tolist() for name, tensor in expected.items()}
        assert capsys.readouterr().out.splitlines()[-1] in NAMES


def test_a_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    for card in cards(texts(tmp_path, "float32", answers=True)):
        monkeypatch.chdir(card.parent)
        names: dict[str, Any] = {}
        exec(code_of(card).replace("a text of yours", "a b c"), names)
        assert names["logits"](**names["inputs"]).shape == (1, 3, len(WORDS))


def test_the_card_says_what_may_be_reported_and_where_the_base_is(tmp_path: Path) -> None:
    adapter, merged = (card.read_text() for card in cards(images(tmp_path, "float32")))
    assert "These lines load it and classify an image:\n" in adapter
    assert "These lines load it and classify an image:\n" in merged
    assert "if it has moved, set `base` to where it is now" in adapter
    assert "weights of the classifier as MISSING or MISMATCH. That is expected where the base" in adapter
    assert "MISSING" not in merged
    assert "`base`" not in merged
