"""The embedded experiment: scikit-learn's handwritten digits as six visual domains, nothing to download.

The 1,797 images are divided once, stratified by class, into disjoint parts: one to pretrain the foundation
model on, one to measure it on, and a training and a test part for every domain. No image is in two parts, so
no domain shares an image with another and the federation never sees what the foundation model learned from.
All draws have a seed of their own: the images are the same in every experiment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedra_engine.config import DataConfig
from fedra_engine.data.domain_data import DomainData, prepare_source
from fedra_engine.runtime.randomness import generator

if TYPE_CHECKING:
    from datasets import Dataset, Features

Images = NDArray[np.float64]
"""Grey levels [images, height, width]: 0 is paper, 1 is ink."""

DIGITS_SEED = 1797
PRETRAINING_IMAGES = 477
HELD_OUT_IMAGES = 120
TRAIN_IMAGES = 140
"""Training images of one domain."""
TEST_IMAGES = 60
"""Test images of one domain."""


def clean(images: Images, rng: np.random.Generator) -> Images:
    """The digits as they were scanned."""
    return images


def inverted(images: Images, rng: np.random.Generator) -> Images:
    """Paper and ink exchanged."""
    return 1.0 - images


def rotated(images: Images, rng: np.random.Generator) -> Images:
    """A quarter turn counter-clockwise."""
    return np.rot90(images, axes=(1, 2))


def noisy(images: Images, rng: np.random.Generator) -> Images:
    """Speckle: a half-normal amount of extra ink on every pixel, saturating."""
    return np.minimum(images + np.abs(rng.normal(scale=0.6, size=images.shape)), 1.0)


def edges(images: Images, rng: np.random.Generator) -> Images:
    """Magnitude of the brightness gradient, stretched to the full range of each image."""
    vertical, horizontal = np.gradient(images, axis=(1, 2))
    magnitude = np.hypot(vertical, horizontal)
    return magnitude / magnitude.max(axis=(1, 2), keepdims=True)


def textured(images: Images, rng: np.random.Generator) -> Images:
    """Each digit written on grey-striped paper: stripes two pixels wide, starting at a random row."""
    count, height, _ = images.shape
    row = np.arange(height) + rng.integers(4, size=(count, 1))
    paper = 0.7 * (row // 2 % 2)[:, :, np.newaxis]
    return paper + (1.0 - paper) * images


DOMAINS: dict[str, Callable[[Images, np.random.Generator], Images]] = {
    "clean": clean,
    "inverted": inverted,
    "rotated": rotated,
    "noisy": noisy,
    "edges": edges,
    "textured": textured,
}
"""The domains, in the order that client capacities follow."""


@dataclass(frozen=True)
class DigitsSplit:
    """Rows of scikit-learn's digits in every part; the parts are disjoint and stratified by class.

    Args:
        pretraining: what the foundation model is trained on.
        held_out: clean digits on which the foundation model is measured.
        train: each domain's training rows.
        test: each domain's test rows.
    """

    pretraining: NDArray[np.int64]
    held_out: NDArray[np.int64]
    train: dict[str, NDArray[np.int64]]
    test: dict[str, NDArray[np.int64]]


def split_digits(labels: NDArray[np.int64]) -> DigitsSplit:
    """Divides the rows whose classes are `labels` [images] into the parts of the experiment."""
    parts = [PRETRAINING_IMAGES, HELD_OUT_IMAGES] + [TRAIN_IMAGES, TEST_IMAGES] * len(DOMAINS)
    pretraining, held_out, *federated, _ = np.split(_interleave_classes(labels), np.cumsum(parts))
    return DigitsSplit(
        pretraining,
        held_out,
        train=dict(zip(DOMAINS, federated[0::2], strict=True)),
        test=dict(zip(DOMAINS, federated[1::2], strict=True)),
    )


def load_digits_source(config: DataConfig, seed: int) -> DomainData:
    """The federation's samples; they bring their test set, so `seed` draws nothing.

    Raises:
        InputError: a domain that does not exist.
    """
    from datasets import concatenate_datasets

    parts = load_digits_domains()
    both = concatenate_datasets(list(parts))
    data = DomainData(
        task="image_classification",
        content=both.select_columns("image"),
        domain_of=np.array(both["domain"]),
        domains=list(DOMAINS),
        labels=np.array(both["label"]),
        classes=list(both.features["label"].names),
        is_test=np.repeat([False, True], [len(part) for part in parts]),
    )
    return prepare_source(data, config, seed, split=False)


def load_digits_domains() -> tuple[Dataset, Dataset]:
    """The federation's training and test samples: image (8 × 8, mode L), label and domain."""
    images, labels = _read_digits()
    split = split_digits(labels)
    return _federated_part("train", split.train, images, labels), _federated_part("test", split.test, images, labels)


def load_pretraining_digits() -> tuple[Dataset, Dataset]:
    """Clean digits to train the foundation model on, and held-out ones to measure it on."""
    images, labels = _read_digits()
    split = split_digits(labels)
    domain = list(DOMAINS).index("clean")
    train, held_out = (
        _as_dataset(images[rows], labels[rows], np.full(len(rows), domain))
        for rows in (split.pretraining, split.held_out)
    )
    return train, held_out


def _read_digits() -> tuple[Images, NDArray[np.int64]]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return digits.images / 16.0, digits.target.astype(np.int64)


def _interleave_classes(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """A random order of the rows in which every stretch has the classes in their overall proportions."""
    rng = generator(DIGITS_SEED, purpose="digits split")
    position = np.empty(len(labels))
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        position[rows] = (np.arange(len(rows)) + rng.uniform()) / len(rows)
    return np.argsort(position, kind="stable")


def _federated_part(
    part: str, rows_of: dict[str, NDArray[np.int64]], images: Images, labels: NDArray[np.int64]
) -> Dataset:
    shifted = [
        DOMAINS[domain](images[rows], generator(DIGITS_SEED, purpose=f"digits {part} {domain}"))
        for domain, rows in rows_of.items()
    ]
    rows = np.concatenate(list(rows_of.values()))
    domains = np.repeat(np.arange(len(rows_of)), [len(rows) for rows in rows_of.values()])
    return _as_dataset(np.concatenate(shifted), labels[rows], domains)


def _as_dataset(images: Images, labels: NDArray[np.int64], domains: NDArray[np.int64]) -> Dataset:
    from datasets import Dataset

    pixels = np.rint(255 * images).astype(np.uint8)
    columns: dict[str, Sequence[object]] = {"image": list(pixels), "label": labels.tolist(), "domain": domains.tolist()}
    return Dataset.from_dict(columns, features=_features())


def _features() -> Features:
    from datasets import ClassLabel, Features, Image

    return Features(
        image=Image(mode="L"),
        label=ClassLabel(names=[str(digit) for digit in range(10)]),
        domain=ClassLabel(names=list(DOMAINS)),
    )
