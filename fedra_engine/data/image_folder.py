"""Images in folders: `<root>/<domain>/<class>/<image>`, as PACS, Office-Home and VLCS are distributed.

Where folders `train` and `test` stand between (`<root>/<domain>/train/<class>` or `<root>/train/<domain>/<class>`),
they are the split.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedra_engine.config import DataConfig
from fedra_engine.data.domain_data import DomainData, prepare_source
from fedra_engine.data.folders import visible_entries
from fedra_engine.data.images import image_column
from fedra_engine.data.names import sort_names
from fedra_engine.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

    from fedra_engine.data.decoded import DecodedImages

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
SPLITS = ("train", "test")

Tree = dict[str, dict[str, list[Path]]]
"""Images by domain and class."""


def load_image_folder(config: DataConfig, seed: int) -> DomainData:
    """The samples below `config.root`; images stay encoded on disk.

    Without `train` and `test` folders, every class of every domain gives `config.test_fraction` of its images, at
    least one and never all of them, to the test set. Classes are the sorted union over the domains, and a domain may
    lack some.

    Raises:
        InputError: a folder that is missing, cannot be listed or has no images, or a domain that has no image to
            spare for the test set.
    """
    data, is_split = read_image_folder(config, image_column)
    return prepare_source(data, config, seed, split=not is_split)


def read_image_folder(
    config: DataConfig, make_content: Callable[[Sequence[str]], Dataset | DecodedImages]
) -> tuple[DomainData, bool]:
    """The samples below `config.root` before any test set is drawn, and whether the folders are split already.

    Args:
        config: of the source.
        make_content: makes the content of the paths of all images.

    Raises:
        InputError: a folder that is missing, cannot be listed or has no images.
    """
    notes: list[str] | None = [] if config.unreadable == "skip" else None
    trees = scan(config.root, config.domains, notes)
    domains = list(trees[0])
    classes = sort_names(name for tree in trees for folders in tree.values() for name in folders)
    index_of = {name: label for label, name in enumerate(classes)}
    samples = [
        (str(image), index_of[name], domains.index(domain), split == 1)
        for split, tree in enumerate(trees)
        for domain, folders in tree.items()
        for name, images in folders.items()
        for image in images
    ]
    if not samples:
        raise InputError(f"data.root: found no images below {config.root!r}, expected some in every domain")
    paths, labels, domain_of, is_test = zip(*samples, strict=True)
    data = DomainData(
        task="image_classification",
        content=make_content(paths),
        domain_of=np.array(domain_of),
        domains=domains,
        labels=np.array(labels),
        classes=classes,
        is_test=np.array(is_test),
        notes=notes or [],
    )
    return data, len(trees) > 1


def scan(root: str | None, domains: Sequence[str] = (), notes: list[str] | None = None) -> list[Tree]:
    """Find the images of `domains`, or of every domain; names are in sorted order.

    Args:
        root: the folder.
        domains: names of those to find.
        notes: learns which folders of classes are passed over because they have no images; without it that raises.

    Returns:
        One tree; or one of `train` and one of `test` folders, with the same domains.

    Raises:
        InputError: a folder that is missing, cannot be listed or has no images.
    """
    if root is None:
        raise InputError("data.root: found null, expected the folder of the images (<root>/<domain>/<class>/<image>)")
    folder = Path(root)
    # Also false, not an error, below a folder that may not be entered.
    if not os.path.isdir(folder):
        raise InputError(f"data.root: found no folder {root!r}, expected one with <domain>/<class>/<image>")
    outer = [folder / split for split in SPLITS] if _is_split(folder) else [folder]
    present = _subfolders(outer[0])
    for domain in domains:
        if domain not in present:
            raise InputError(f"data.domains: found {domain!r}, expected some of the folders in {outer[0]}: {present}")
    if not present:
        raise InputError(f"data.root: found no folders in {str(outer[0])!r}, expected one for each domain")
    chosen = list(domains) or present
    if len(outer) == 1 and any(_is_split(folder / domain) for domain in chosen):
        return [{domain: _scan_domain(folder / domain / split, notes) for domain in chosen} for split in SPLITS]
    return [{domain: _scan_domain(above / domain, notes) for domain in chosen} for above in outer]


def _is_split(folder: Path) -> bool:
    # Both, because `train` alone may be a class.
    return all(os.path.isdir(folder / split) for split in SPLITS)


def _scan_domain(folder: Path, notes: list[str] | None) -> dict[str, list[Path]]:
    classes = {name: _images(folder / name) for name in _subfolders(folder)}
    if not classes:
        raise InputError(f"data.root: found no folders in {str(folder)!r}, expected one for each class")
    for name in [name for name, images in classes.items() if not images]:
        if notes is None:
            raise InputError(
                f"data.root: found no images in {str(folder / name)!r}, expected files that end in one of "
                f"{' '.join(sorted(IMAGE_SUFFIXES))}, or data.unreadable skip"
            )
        notes.append(f"{folder / name}: skipped, it has no images")
        del classes[name]
    return classes


def _subfolders(folder: Path) -> list[str]:
    return [entry.name for entry in visible_entries(folder) if os.path.isdir(entry)]


def _images(folder: Path) -> list[Path]:
    return [entry for entry in visible_entries(folder) if entry.suffix.lower() in IMAGE_SUFFIXES]
