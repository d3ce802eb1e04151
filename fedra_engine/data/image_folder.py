"""Images in folders: `<root>/<domain>/<class>/<image>`, as PACS, Office-Home and VLCS are distributed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedra_engine.config import DataConfig
from fedra_engine.errors import InputError
from fedra_engine.randomness import generator

if TYPE_CHECKING:
    from datasets import Dataset

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})

Tree = dict[str, dict[str, list[Path]]]
"""Images by domain and class."""


def load_image_folder(config: DataConfig, seed: int) -> tuple[Dataset, Dataset]:
    """The training and test samples below `config.root`; images stay encoded on disk.

    Every class of every domain gives `config.test_fraction` of its images, at least one and never all of
    them, to the test set. So every domain has training samples. Classes are the sorted union over the domains,
    and a domain may lack some.

    Raises:
        InputError: a folder that is missing, cannot be listed or has no images, or a domain that has no image to
            spare for the test set.
    """
    tree = scan(config.root, config.domains)
    domains = list(tree)
    classes = sorted({name for folders in tree.values() for name in folders})
    train: list[tuple[str, int, int]] = []
    test: list[tuple[str, int, int]] = []
    for domain, folders in tree.items():
        if all(len(images) == 1 for images in folders.values()):
            raise InputError(
                f"data.test_fraction: found {config.test_fraction} but no test image in domain {domain!r}, whose "
                "classes have one image each, expected a class of at least 2"
            )
        for name, images in folders.items():
            rng = generator(seed, purpose=f"test split of {domain}/{name}")
            held_out = _held_out(len(images), config.test_fraction, rng)
            for image, is_test in zip(images, held_out, strict=True):
                sample = (str(image), classes.index(name), domains.index(domain))
                (test if is_test else train).append(sample)
    return _as_dataset(train, classes, domains), _as_dataset(test, classes, domains)


def scan(root: str | None, domains: Sequence[str] = ()) -> Tree:
    """Find the images of `domains`, or of every domain; names are in sorted order.

    Raises:
        InputError: a folder that is missing, cannot be listed or has no images.
    """
    if root is None:
        raise InputError("data.root: found null, expected the folder of the images (<root>/<domain>/<class>/<image>)")
    folder = Path(root)
    # Also false, not an error, below a folder that may not be entered.
    if not os.path.isdir(folder):
        raise InputError(f"data.root: found no folder {root!r}, expected one with <domain>/<class>/<image>")
    present = _subfolders(folder)
    for domain in domains:
        if domain not in present:
            raise InputError(f"data.domains: found {domain!r}, expected some of the folders in {root}: {present}")
    tree = {domain: _scan_domain(folder / domain) for domain in domains or present}
    if not tree:
        raise InputError(f"data.root: found no folders in {root!r}, expected one for each domain")
    return tree


def _scan_domain(folder: Path) -> dict[str, list[Path]]:
    classes = {name: _images(folder / name) for name in _subfolders(folder)}
    if not classes:
        raise InputError(f"data.root: found no folders in {str(folder)!r}, expected one for each class")
    for name, images in classes.items():
        if not images:
            raise InputError(
                f"data.root: found no images in {str(folder / name)!r}, expected files that end in one of "
                f"{' '.join(sorted(IMAGE_SUFFIXES))}"
            )
    return classes


def _subfolders(folder: Path) -> list[str]:
    return [entry.name for entry in _entries(folder) if os.path.isdir(entry) and not entry.name.startswith(".")]


def _images(folder: Path) -> list[Path]:
    return [entry for entry in _entries(folder) if entry.suffix.lower() in IMAGE_SUFFIXES]


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise InputError(f"data.root: cannot list {folder}: {error.strerror}; expected a readable folder") from error


def _held_out(count: int, fraction: float, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Which of `count` images are test images, bool [count]."""
    held_out = min(max(round(fraction * count), 1), count - 1)
    return rng.permutation(count) < held_out


def _as_dataset(samples: Sequence[tuple[str, int, int]], classes: list[str], domains: list[str]) -> Dataset:
    images, labels, indices = zip(*samples, strict=True) if samples else ((), (), ())
    from datasets import ClassLabel, Dataset, Features, Image

    features = Features(image=Image(), label=ClassLabel(names=classes), domain=ClassLabel(names=domains))
    columns = {"image": list(images), "label": list(labels), "domain": list(indices)}
    return Dataset.from_dict(columns, features=features)
