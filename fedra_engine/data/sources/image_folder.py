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
from fedra_engine.data.domain_data import DecodedImages, DomainData, prepare_source
from fedra_engine.data.images import image_column, image_suffixes
from fedra_engine.data.names import encode_names
from fedra_engine.data.sources.tables import check_chosen, left_out_notes, visible_entries
from fedra_engine.runtime.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

SPLITS = ("train", "test")
_KINDS = "the kinds that Pillow reads, such as .jpg and .png"


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
    left_out: list[Path] = []
    skipped: list[str] = []
    folders = _domain_folders(config, left_out)
    samples = [
        (str(image), name, domain, is_test)
        for is_test, domain, folder in folders
        for name, images in _images_by_class(folder, config, left_out, skipped).items()
        for image in images
    ]
    if not samples:
        raise InputError(f"data.root: found no images below {config.root!r}, expected some in every domain")
    paths, names, domain_names, is_test = zip(*samples, strict=True)
    labels, classes = encode_names(names)
    domains = list(dict.fromkeys(domain for _, domain, _ in folders))
    data = DomainData(
        task="image_classification",
        content=make_content(paths),
        domain_of=np.array([domains.index(name) for name in domain_names]),
        domains=domains,
        labels=labels,
        classes=classes,
        is_test=np.array(is_test, dtype=np.bool_),
        notes=skipped + left_out_notes(Path(str(config.root)), left_out, f"<domain>/<class>/<image> of {_KINDS}"),
    )
    return data, len(folders) > len(domains)


def _domain_folders(config: DataConfig, left_out: list[Path]) -> list[tuple[int, str, Path]]:
    """Whether for testing (0 or 1), name and folder of every chosen domain; all training folders come first.

    What is there besides is added to `left_out`.
    """
    if config.root is None:
        raise InputError("data.root: found null, expected the folder of the images (<root>/<domain>/<class>/<image>)")
    root = Path(config.root)
    # Also false, not an error, below a folder that may not be entered.
    if not os.path.isdir(root):
        raise InputError(f"data.root: found no folder {str(root)!r}, expected one with <domain>/<class>/<image>")
    outer = [root / split for split in SPLITS] if _is_split(root, left_out) else [root]
    present = _subfolders(outer[0], left_out)
    if not present:
        raise InputError(f"data.root: found no folders in {str(outer[0])!r}, expected one for each domain")
    check_chosen(config.domains, present, outer[0])
    chosen = config.domains or present
    # All of them, to note what else is in each.
    are_split = [len(outer) == 1 and _is_split(root / domain, left_out) for domain in chosen]
    if any(are_split):
        return [(is_test, domain, root / domain / split) for is_test, split in enumerate(SPLITS) for domain in chosen]
    for other in outer[1:]:
        left_out += [other / name for name in _subfolders(other, left_out) if name not in present]
    return [(is_test, domain, above / domain) for is_test, above in enumerate(outer) for domain in chosen]


def _is_split(folder: Path, left_out: list[Path]) -> bool:
    """Whether `folder` has those of both splits, as `train` alone may be a class; all else in it is left out then."""
    is_split = all(os.path.isdir(folder / split) for split in SPLITS)
    if is_split:
        left_out += [entry for entry in visible_entries(folder) if entry.name not in SPLITS]
    return is_split


def _images_by_class(
    folder: Path, config: DataConfig, left_out: list[Path], skipped: list[str]
) -> dict[str, list[Path]]:
    """The images of a domain; classes without any get a note in `skipped`, or are an error."""
    classes = {}
    for name in _subfolders(folder, left_out):
        entries = visible_entries(folder / name)
        classes[name] = [entry for entry in entries if entry.suffix.lower() in image_suffixes()]
        left_out += {*entries} - {*classes[name]}
    if not classes:
        raise InputError(f"data.root: found no folders in {str(folder)!r}, expected one for each class")
    for name in [name for name, images in classes.items() if not images]:
        if config.unreadable == "error":
            raise InputError(
                f"data.root: found no images directly in {str(folder / name)!r}, expected files of {_KINDS}, or "
                "data.unreadable skip"
            )
        skipped.append(f"{folder / name}: skipped, it has no images")
        del classes[name]
    return classes


def _subfolders(folder: Path, left_out: list[Path]) -> list[str]:
    entries = visible_entries(folder)
    found = [entry.name for entry in entries if os.path.isdir(entry)]
    left_out += [entry for entry in entries if entry.name not in found]
    return found
