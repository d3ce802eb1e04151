"""Images in folders: `<root>/<domain>/<class>/<image>`, as PACS, Office-Home and VLCS are distributed.

Where folders `train` and `test` stand between (`<root>/<domain>/train/<class>` or `<root>/train/<domain>/<class>`),
they are the split.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedra_engine.config import DataConfig
from fedra_engine.data.domain_data import DomainData, prepare_source
from fedra_engine.data.folders import check_chosen, left_out_notes, visible_entries
from fedra_engine.data.images import image_column, image_suffixes
from fedra_engine.data.names import sort_names
from fedra_engine.runtime.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

    from fedra_engine.data.decoded import DecodedImages

SPLITS = ("train", "test")
_KINDS = "the kinds that Pillow reads, such as .jpg and .png"

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
    folders = _Folders(config)
    trees = folders.trees()
    domains = list(trees[0])
    classes = sort_names(name for tree in trees for by_class in tree.values() for name in by_class)
    index_of = {name: label for label, name in enumerate(classes)}
    samples = [
        (str(image), index_of[name], domains.index(domain), split == 1)
        for split, tree in enumerate(trees)
        for domain, by_class in tree.items()
        for name, images in by_class.items()
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
        notes=folders.notes(),
    )
    return data, len(trees) > 1


@dataclass
class _Folders:
    """Finds images, and notes what is there besides.

    Attributes:
        config: of the source.
        skipped: folders of classes that have no images.
        left_out: files that are no images, and folders where images are expected.
    """

    config: DataConfig
    skipped: list[Path] = field(default_factory=list)
    left_out: list[Path] = field(default_factory=list)

    def trees(self) -> list[Tree]:
        """The images of the chosen domains, or of every domain; names are in sorted order.

        Returns:
            One tree; or one of `train` and one of `test` folders, with the same domains.

        Raises:
            InputError: a folder that is missing, cannot be listed or has no images.
        """
        if self.config.root is None:
            raise InputError(
                "data.root: found null, expected the folder of the images (<root>/<domain>/<class>/<image>)"
            )
        root = Path(self.config.root)
        # Also false, not an error, below a folder that may not be entered.
        if not os.path.isdir(root):
            raise InputError(f"data.root: found no folder {str(root)!r}, expected one with <domain>/<class>/<image>")
        outer = self._splits(root) or [root]
        present = self._subfolders(outer[0])
        if not present:
            raise InputError(f"data.root: found no folders in {str(outer[0])!r}, expected one for each domain")
        check_chosen(self.config.domains, present, outer[0])
        chosen = self.config.domains or present
        if len(outer) == 1 and any(_is_split(root / domain) for domain in chosen):
            split = [self._splits(root / domain) or [root / domain / name for name in SPLITS] for domain in chosen]
            return [
                {domain: self._domain(folder) for domain, folder in zip(chosen, folders, strict=True)}
                for folders in zip(*split, strict=True)
            ]
        for other in outer[1:]:
            self.left_out += [other / name for name in self._subfolders(other) if name not in present]
        return [{domain: self._domain(above / domain) for domain in chosen} for above in outer]

    def notes(self) -> list[str]:
        """What was passed over, for people."""
        skipped = [f"{folder}: skipped, it has no images" for folder in self.skipped]
        return skipped + left_out_notes(
            Path(str(self.config.root)), self.left_out, f"<domain>/<class>/<image> of {_KINDS}"
        )

    def _splits(self, folder: Path) -> list[Path]:
        """The folders of the training and the test samples; none if `folder` is not split."""
        if not _is_split(folder):
            return []
        self.left_out += [entry for entry in visible_entries(folder) if entry.name not in SPLITS]
        return [folder / split for split in SPLITS]

    def _domain(self, folder: Path) -> dict[str, list[Path]]:
        classes = {name: self._images(folder / name) for name in self._subfolders(folder)}
        if not classes:
            raise InputError(f"data.root: found no folders in {str(folder)!r}, expected one for each class")
        for name in [name for name, images in classes.items() if not images]:
            if self.config.unreadable == "error":
                raise InputError(
                    f"data.root: found no images directly in {str(folder / name)!r}, expected files of {_KINDS}, or "
                    "data.unreadable skip"
                )
            self.skipped.append(folder / name)
            del classes[name]
        return classes

    def _subfolders(self, folder: Path) -> list[str]:
        entries = visible_entries(folder)
        found = [entry.name for entry in entries if os.path.isdir(entry)]
        self.left_out += [entry for entry in entries if entry.name not in found]
        return found

    def _images(self, folder: Path) -> list[Path]:
        entries = visible_entries(folder)
        found = [entry for entry in entries if entry.suffix.lower() in image_suffixes()]
        self.left_out += {*entries} - {*found}
        return found


def _is_split(folder: Path) -> bool:
    # Both, because `train` alone may be a class.
    return all(os.path.isdir(folder / split) for split in SPLITS)
