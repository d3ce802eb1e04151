"""What is saved beside a model makes the inputs that the run made."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer

from fedra_engine.data.images import decode_image
from fedra_engine.data.preprocessing import Preprocessing, preprocessing_for
from fedra_engine.data.tokenization import tokenization_for
from fedra_engine.exports.processor_files import save_processor
from tests.data.tokenizers import WORDS, save_decoder_tokenizer, save_encoder_tokenizer
from tests.tiny import make_model


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_becomes_the_same_pixels(tmp_path: Path, channels: int) -> None:
    levels = np.random.default_rng(0).integers(0, 256, (30, 20, 3)).astype(np.uint8)
    picture = Image.fromarray(levels).convert("L" if channels == 1 else "RGB")
    picture.save(tmp_path / "picture.png")
    preprocessing = Preprocessing(12, channels, (0.4, 0.5, 0.6)[:channels], (0.1, 0.2, 0.3)[:channels])
    save_processor(tmp_path, preprocessing, "image_classification")
    found = AutoImageProcessor.from_pretrained(tmp_path)(picture, return_tensors="np")["pixel_values"][0]
    pixels = decode_image({"path": str(tmp_path / "picture.png")}, preprocessing) / 255
    mean, std = (np.array(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
    np.testing.assert_allclose(found, (pixels - mean) / std, atol=1e-5)


def test_a_later_run_finds_the_same_preprocessing(tmp_path: Path) -> None:
    preprocessing = Preprocessing(8, 1, (0.4,), (0.2,))
    save_processor(tmp_path, preprocessing, "image_classification")
    assert preprocessing_for(str(tmp_path), make_model("vit").config) == preprocessing


def test_a_tokenizer_has_the_runs_length_and_is_not_changed_itself(tmp_path: Path) -> None:
    config = make_model("bert").config
    tokenizer = AutoTokenizer.from_pretrained(save_encoder_tokenizer(tmp_path / "own"))
    save_processor(tmp_path, tokenization_for(None, config, 8, tokenizer), "text_classification")
    found, text = AutoTokenizer.from_pretrained(tmp_path), " ".join("abcdefghijkl")
    assert found(text, truncation=True)["input_ids"] == tokenizer(text, truncation=True, max_length=8)["input_ids"]
    assert tokenizer.model_max_length == 64


def test_a_classifiers_tokenizer_pads_with_what_the_run_padded_with(tmp_path: Path) -> None:
    """Some models classify by the last token that is not the padding token of their configuration."""
    config = make_model("llama").config
    config.pad_token_id = WORDS.index("</s>")
    tokenizer = AutoTokenizer.from_pretrained(save_encoder_tokenizer(tmp_path / "own"))
    save_processor(tmp_path, tokenization_for(None, config, 8, tokenizer), "text_classification")
    found = AutoTokenizer.from_pretrained(tmp_path)(["a b", "c"], padding=True)["input_ids"]
    assert found[1] == [WORDS.index(word) for word in ("[CLS]", "c", "[SEP]", "</s>")]
    assert tokenizer.pad_token == "[PAD]"


def test_a_language_models_tokenizer_without_padding_gets_the_runs_and_keeps_its_length(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(save_decoder_tokenizer(tmp_path / "own"))
    assert tokenizer.pad_token is None
    tokenization = tokenization_for(None, make_model("llama").config, 8, tokenizer)
    save_processor(tmp_path, tokenization, "causal_lm")
    found = AutoTokenizer.from_pretrained(tmp_path)
    assert (found.pad_token_id, found.model_max_length) == (tokenization.padding, 64)
    assert not any(path.is_dir() for path in tmp_path.iterdir() if path.name != "own")
