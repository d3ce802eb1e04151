"""The embedded experiment: scikit-learn's handwritten digits as six visual domains, nothing to download.

The 1,797 images are divided, stratified by class, into disjoint parts: one to pretrain the foundation model, one to
evaluate it, and a training and a test part for every domain. So no domain shares an image with another or with
pretraining. All draws have a seed of their own: the images are the same in every experiment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedra_engine.config import DataConfig
from fedra_engine.data.domain_data import DomainData
from fedra_engine.data.sources.tables import dataset_samples
from fedra_engine.runtime.randomness import generator

if TYPE_CHECKING:
    from datasets import Dataset

Images = NDArray[np.float64]
"""Grey levels [images, height, width] from 0 (paper) to 1 (ink)."""

DIGITS_SEED = 1797
PRETRAINING_IMAGES = 477
HELD_OUT_IMAGES = 120
TRAIN_IMAGES, TEST_IMAGES = 140, 60
"""Images of each domain."""


def edges(images: Images, rng: np.random.Generator) -> Images:
    """Magnitude of the brightness gradient, scaled to a maximum of 1 in each image."""
    vertical, horizontal = np.gradient(images, axis=(1, 2))
    magnitude = np.hypot(vertical, horizontal)
    return magnitude / magnitude.max(axis=(1, 2), keepdims=True)


def textured(images: Images, rng: np.random.Generator) -> Images:
    """Digits on grey-striped paper: stripes two pixels wide, starting at a random row."""
    count, height, _ = images.shape
    row = np.arange(height) + rng.integers(4, size=(count, 1))
    paper = 0.7 * (row // 2 % 2)[:, :, np.newaxis]
    return paper + (1.0 - paper) * images


DOMAINS: dict[str, Callable[[Images, np.random.Generator], Images]] = {
    "clean": lambda images, rng: images,
    "inverted": lambda images, rng: 1.0 - images,
    "rotated": lambda images, rng: np.rot90(images, axes=(1, 2)),
    # Adds a half-normal amount of ink to every pixel.
    "noisy": lambda images, rng: np.minimum(images + np.abs(rng.normal(scale=0.6, size=images.shape)), 1.0),
    "edges": edges,
    "textured": textured,
}
"""The transformation of the scans in each domain; client capacities follow this order."""


def split_digits(labels: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
    """Divide scikit-learn's digits, whose classes are `labels` [images], into disjoint parts, stratified by class.

    Returns:
        Rows of each part: `pretraining` and `held_out` to train and evaluate the foundation model, and
        `train <domain>` and `test <domain>` for every domain.
    """
    names = ["pretraining", "held_out", *(f"{part} {domain}" for domain in DOMAINS for part in ("train", "test"))]
    counts = [PRETRAINING_IMAGES, HELD_OUT_IMAGES] + [TRAIN_IMAGES, TEST_IMAGES] * len(DOMAINS)
    *parts, _ = np.split(_interleave_classes(labels), np.cumsum(counts))
    return dict(zip(names, parts, strict=True))


def load_digits_source(config: DataConfig, seed: int) -> DomainData:
    """The samples of all domains; they have a test set, so `seed` draws nothing."""
    splits = {split: digits_dataset([f"{split} {domain}" for domain in DOMAINS]) for split in ("train", "test")}
    # Generated images are not cached.
    return replace(dataset_samples(splits, config, seed), sample_sources=None, fingerprint=None)


def digits_dataset(parts: Sequence[str]) -> Dataset:
    """The images (8 × 8, mode L), labels and domains of `parts` that `split_digits` names.

    Images are transformed by their domain; those for the foundation model are `clean`.
    """
    from datasets import ClassLabel, Dataset, Features, Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    labels = digits.target.astype(np.int64)
    split = split_digits(labels)
    columns: dict[str, list[object]] = {"image": [], "label": [], "domain": []}
    for part in parts:
        rows, domain = split[part], part.partition(" ")[2] or "clean"
        images = DOMAINS[domain](digits.images[rows] / 16.0, generator(DIGITS_SEED, purpose=f"digits {part}"))
        columns["image"] += list(np.rint(255 * images).astype(np.uint8))
        columns["label"] += labels[rows].tolist()
        columns["domain"] += [domain] * len(rows)
    features = Features(
        image=Image(mode="L"),
        label=ClassLabel(names=[str(digit) for digit in range(10)]),
        domain=ClassLabel(names=list(DOMAINS)),
    )
    return Dataset.from_dict(columns, features=features)


def _interleave_classes(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """A random order of the rows in which every range has about the same proportions of classes."""
    rng = generator(DIGITS_SEED, purpose="digits split")
    position = np.empty(len(labels))
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        position[rows] = (np.arange(len(rows)) + rng.uniform()) / len(rows)
    return np.argsort(position, kind="stable")
