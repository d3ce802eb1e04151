"""The embedded experiment: the six digit domains and the foundation model that ships with the package."""

from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.datasets import load_digits
from transformers import ViTForImageClassification, ViTImageProcessorPil

import fedra_engine
from fedra_engine.data.sources.digits import (
    DOMAINS,
    HELD_OUT_IMAGES,
    PRETRAINING_IMAGES,
    TEST_IMAGES,
    TRAIN_IMAGES,
    digits_dataset,
    split_digits,
)
from fedra_engine.runtime.randomness import generator

Split = dict[str, np.ndarray]

MODEL = Path(fedra_engine.__path__[0]) / "assets" / "digits_vit"


@pytest.fixture(scope="module")
def labels() -> np.ndarray:
    return load_digits().target


@pytest.fixture(scope="module")
def split(labels: np.ndarray) -> Split:
    return split_digits(labels)


def domains_of(part: str) -> Dataset:
    return digits_dataset([f"{part} {domain}" for domain in DOMAINS])


def pixels(data: Dataset) -> np.ndarray:
    return np.stack([np.asarray(image) for image in data["image"]])


def test_no_image_is_in_two_parts(split: Split) -> None:
    rows = np.concatenate(list(split.values()))
    assert len(np.unique(rows)) == len(rows) <= len(load_digits().target)


def test_pretraining_images_do_not_reappear_in_the_clean_domain() -> None:
    seen = {image.tobytes() for image in pixels(digits_dataset(["pretraining", "held_out"]))}
    assert seen.isdisjoint(image.tobytes() for image in pixels(digits_dataset(["train clean", "test clean"])))


def test_domains_come_in_the_order_of_the_capacities() -> None:
    data = domains_of("test")
    assert data.features["domain"].names == ["clean", "inverted", "rotated", "noisy", "edges", "textured"]
    assert data.features["label"].names == [str(digit) for digit in range(10)]


def test_every_domain_has_the_same_number_of_samples() -> None:
    train, test = domains_of("train"), domains_of("test")
    assert np.bincount(train["domain"]).tolist() == [TRAIN_IMAGES] * 6
    assert np.bincount(test["domain"]).tolist() == [TEST_IMAGES] * 6
    assert [len(digits_dataset([part])) for part in ("pretraining", "held_out")] == [
        PRETRAINING_IMAGES,
        HELD_OUT_IMAGES,
    ]


def test_every_part_is_stratified_by_class(split: Split, labels: np.ndarray) -> None:
    share = np.bincount(labels) / len(labels)
    for rows in split.values():
        assert_allclose(np.bincount(labels[rows], minlength=10), share * len(rows), atol=2)


def test_loading_twice_gives_the_same_samples() -> None:
    first, second = domains_of("train"), domains_of("train")
    assert_array_equal(pixels(first), pixels(second))
    assert first["label"] == second["label"]


def test_samples_carry_the_label_of_their_image(split: Split, labels: np.ndarray) -> None:
    train = domains_of("train")
    assert list(train["label"]) == labels[np.concatenate([split[f"train {domain}"] for domain in DOMAINS])].tolist()
    inverted_rows = slice(TRAIN_IMAGES, 2 * TRAIN_IMAGES)
    original = load_digits().images[split["train inverted"]]
    assert_allclose(pixels(train)[inverted_rows], 255 - 255 * original / 16, atol=0.5)


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_domain_keeps_grey_levels_in_range_and_its_input_unchanged(domain: str) -> None:
    images = load_digits().images[:50] / 16
    before = images.copy()
    shifted = DOMAINS[domain](images, generator(0, purpose="test"))
    assert_array_equal(images, before)
    assert shifted.shape == images.shape
    assert 0 <= shifted.min() < shifted.max() <= 1
    assert (domain == "clean") == np.array_equal(shifted, images)


def test_shipped_model_is_small() -> None:
    assert (MODEL / "model.safetensors").stat().st_size <= 3_000_000


def test_shipped_model_classifies_held_out_clean_digits() -> None:
    model = ViTForImageClassification.from_pretrained(MODEL).eval()
    processor = ViTImageProcessorPil.from_pretrained(MODEL)
    held_out = digits_dataset(["held_out"])
    inputs = processor(list(held_out["image"]), return_tensors="pt")
    with torch.no_grad():
        found = model(**inputs).logits.argmax(1)
    accuracy = (found == torch.tensor(list(held_out["label"]))).float().mean().item()
    assert accuracy >= 0.93
    assert f"**{accuracy:.4f}**" in (MODEL / "README.md").read_text(encoding="utf-8")


def test_model_card_has_the_command() -> None:
    assert "python launchers/pretrain.py --output_dir" in (MODEL / "README.md").read_text(encoding="utf-8")
