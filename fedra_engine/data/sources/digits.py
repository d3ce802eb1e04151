"""The embedded experiment: scikit-learn's handwritten digits as six visual domains, nothing to download.

The 1,797 images are divided, stratified by class, into disjoint parts: one to pretrain the foundation model, one to
evaluate it, and a training and a test part for every domain. So no domain shares an image with another or with
pretraining. All draws have a seed of their own: the images are the same in every experiment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedra_engine.config import DataConfig
from fedra_engine.data.domain_data import DomainData, prepare_source
from fedra_engine.runtime.errors import InputError
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
CLASSES = tuple(str(digit) for digit in range(10))
"""Names of the classes."""


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
    train, test = (_draw([f"{split} {domain}" for domain in DOMAINS]) for split in ("train", "test"))
    data = DomainData(
        task="image_classification",
        content=np.concatenate([train.images, test.images]),
        domain_of=np.concatenate([train.domains, test.domains]),
        domains=list(DOMAINS),
        labels=np.concatenate([train.labels, test.labels]),
        classes=list(CLASSES),
        is_test=np.arange(len(train.labels) + len(test.labels)) >= len(train.labels),
    )
    return prepare_source(data, config, seed, split=False)


def digits_dataset(parts: Sequence[str]) -> Dataset:
    """The images (8 × 8, mode L), labels and domains of `parts` that `split_digits` names.

    Images are transformed by their domain; those for the foundation model are `clean`.
    """
    from datasets import ClassLabel, Dataset, Features, Image

    digits = _draw(parts)
    columns = {"image": list(digits.images), "label": digits.labels.tolist(), "domain": digits.domains.tolist()}
    features = Features(
        image=Image(mode="L"), label=ClassLabel(names=list(CLASSES)), domain=ClassLabel(names=list(DOMAINS))
    )
    return Dataset.from_dict(columns, features=features)


class _Digits(NamedTuple):
    """Samples of one or several parts.

    Attributes:
        images: uint8 [images, height, width].
        labels: int64 [images], index into `CLASSES`.
        domains: int64 [images], index into `DOMAINS`.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    domains: NDArray[np.int64]


def _draw(parts: Sequence[str]) -> _Digits:
    scans, labels = read_digits()
    split, names = split_digits(labels), list(DOMAINS)
    rows = np.concatenate([split[part] for part in parts])
    images, domains = list[NDArray[np.uint8]](), list[int]()
    for part in parts:
        domain = part.partition(" ")[2] or "clean"
        grey = DOMAINS[domain](scans[split[part]] / 16.0, generator(DIGITS_SEED, purpose=f"digits {part}"))
        images.append(np.rint(255 * grey).astype(np.uint8))
        domains += [names.index(domain)] * len(grey)
    return _Digits(np.concatenate(images), labels[rows], np.array(domains, dtype=np.int64))


def read_digits() -> tuple[Images, NDArray[np.int64]]:
    """What scikit-learn's `load_digits` returns: scans [images, 8, 8] with levels from 0 to 16, and labels [images].

    The file is read without importing scikit-learn, which takes as long as half of torch.

    Raises:
        InputError: scikit-learn is not installed, or lacks the file.
    """
    spec = find_spec("sklearn")
    places = [] if spec is None else spec.submodule_search_locations or []
    files = [file for place in places if (file := Path(place, "datasets", "data", "digits.csv.gz")).is_file()]
    if not files:
        raise InputError("data.source: found no digits in scikit-learn, expected it to be installed with its data")
    table = np.loadtxt(files[0], delimiter=",")
    return table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(np.int64)


def _interleave_classes(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """A random order of the rows in which every range has about the same proportions of classes."""
    rng = generator(DIGITS_SEED, purpose="digits split")
    position = np.empty(len(labels))
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        position[rows] = (np.arange(len(rows)) + rng.uniform()) / len(rows)
    return np.argsort(position, kind="stable")
