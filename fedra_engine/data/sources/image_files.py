"""Image files, found by folders or by lists.

Folders: `<root>/<domain>/<class>/<image>`, the layout of PACS, Office-Home and VLCS, or with a split
`<root>/<domain>/train/<class>` or `<root>/train/<domain>/<class>`, and the same for `test`.

Lists: those of DomainNet and NICO++, `<domain>_{train,test}.txt` with a path and a label on every line.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedra_engine.config import DataConfig
from fedra_engine.data.domain_data import DomainData, SampleSource, encode_names, prepare_source, sample_sources
from fedra_engine.data.images import image_column, image_suffixes
from fedra_engine.data.sources.files import (
    chosen_domains,
    left_out_notes,
    nearby_root_hint,
    text_lines,
    undecodable,
    visible_entries,
)
from fedra_engine.runtime.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

SPLITS = ("train", "test")
LAYOUTS = {"domainnet": ("splits", 345), "nicopp": ("NICO_DG_official", 60)}
"""Folder of the lists below the root, and number of classes, of each benchmark; paths are relative to the root."""
_KINDS = "the kinds that Pillow reads, such as .jpg and .png"
_ENCODING = "utf-8"
_LINE = re.compile(r"\s*(\S.*?)\s+(-?\d{1,18})\s*")
"""Path and label; the path may have spaces."""


def load_image_folder(config: DataConfig, seed: int) -> DomainData:
    """The samples in the folders of `config.root`.

    Without `train` and `test` folders, `seed` draws a test set. Classes are the sorted union over the domains.

    Raises:
        InputError: a folder is missing, cannot be listed or has no images, or a domain has too few images for a test
            set.
    """
    try:
        data, is_split = read_image_folder(config, image_column)
    except _WrongLevelError as error:
        raise InputError(f"{error}{_level_hint(error.folder, config)}") from error
    return prepare_source(data, config, seed, split=not is_split)


def read_image_folder(
    config: DataConfig, make_content: Callable[[Sequence[str]], Dataset | NDArray[np.uint8]]
) -> tuple[DomainData, bool]:
    """The same before `prepare_source`, and whether there are `train` and `test` folders.

    `make_content` makes `DomainData.content` from the paths of all images.
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
        message = f"data.root: found no images below {config.root!r}, expected some in every domain"
        raise _WrongLevelError(message, Path(str(config.root)))
    paths, names, domain_names, is_test = zip(*samples, strict=True)
    labels, classes = encode_names(names)
    domains = list(dict.fromkeys(domain for _, domain, _ in folders))
    data = DomainData(
        task="image_classification",
        content=make_content(paths),
        domain_of=encode_names(domain_names, domains)[0],
        domains=domains,
        labels=labels,
        classes=classes,
        is_test=np.array(is_test, dtype=np.bool_),
        notes=skipped + left_out_notes(Path(str(config.root)), left_out, f"<domain>/<class>/<image> of {_KINDS}"),
    )
    return data, len(folders) > len(domains)


def _domain_folders(config: DataConfig, left_out: list[Path]) -> list[tuple[int, str, Path]]:
    """(is test, domain, folder) for every chosen domain, training folders first."""
    root = Path(str(config.root))
    # Unlike Path.is_dir, false below a folder that may not be entered.
    if not os.path.isdir(root):
        raise InputError(f"data.root: found no folder {str(root)!r}, expected one with <domain>/<class>/<image>")
    outer = [root / split for split in SPLITS] if _is_split(root, left_out) else [root]
    present = _subfolders(outer[0], left_out)
    if not present:
        message = f"data.root: found no folders in {str(outer[0])!r}, expected one for each domain"
        raise _WrongLevelError(message, outer[0])
    chosen = chosen_domains(config, present, outer[0])
    # Not a generator in `any`: `_is_split` adds to `left_out`.
    are_split = [len(outer) == 1 and _is_split(root / domain, left_out) for domain in chosen]
    if any(are_split):
        return [(is_test, domain, root / domain / split) for is_test, split in enumerate(SPLITS) for domain in chosen]
    for other in outer[1:]:
        left_out += [other / name for name in _subfolders(other, left_out) if name not in present]
    return [(is_test, domain, above / domain) for is_test, above in enumerate(outer) for domain in chosen]


def _is_split(folder: Path, left_out: list[Path]) -> bool:
    """Whether `folder` has folders for both splits (`train` alone may be a class); others are added to `left_out`."""
    is_split = all(os.path.isdir(folder / split) for split in SPLITS)
    if is_split:
        left_out += [entry for entry in visible_entries(folder) if entry.name not in SPLITS]
    return is_split


def _images_by_class(
    folder: Path, config: DataConfig, left_out: list[Path], skipped: list[str]
) -> dict[str, list[Path]]:
    """The images of a domain; a class without images adds a note to `skipped`, or is an InputError."""
    names = _subfolders(folder, left_out)
    if not names:
        message = f"data.root: found no folders in {str(folder)!r}, expected one for each class"
        raise _WrongLevelError(message, folder)
    classes = {}
    for name in names:
        entries = visible_entries(folder / name)
        images = _images(entries)
        left_out += {*entries} - {*images}
        if images:
            classes[name] = images
        elif config.unreadable == "skip":
            skipped.append(f"{folder / name}: skipped, it has no images")
        else:
            raise _WrongLevelError(
                f"data.root: found no images directly in {str(folder / name)!r}, expected files of {_KINDS}, or "
                "data.unreadable skip",
                folder / name,
            )
    return classes


def _images(entries: Sequence[Path]) -> list[Path]:
    return [entry for entry in entries if entry.suffix.lower() in image_suffixes()]


class _WrongLevelError(InputError):
    """A `folder` has not what is expected at its level below the root; perhaps the root is not where it should be."""

    def __init__(self, message: str, folder: Path) -> None:
        super().__init__(message)
        self.folder = folder


def _level_hint(folder: Path, config: DataConfig) -> str:
    """The end of a message: what a folder seems to be that is not what it should be, and which root would fit."""

    def fits(root: Path) -> bool:
        domains = [domain for *_, domain in _domain_folders(replace(config, root=str(root), domains=[]), [])]
        classes = [domain / name for domain in domains for name in _subfolders(domain, [])[:1]]
        return len(classes) == len(domains) and all(_images(visible_entries(each)) for each in classes)

    root, entries = Path(str(config.root)), visible_entries(folder)
    what = ""
    if _images(entries):
        what = " (it has images, as a class has)"
    elif folder != root and any(map(os.path.isdir, entries)):
        what = " (it has folders, as a domain has)"
    return what + nearby_root_hint(root, fits)


def _subfolders(folder: Path, left_out: list[Path]) -> list[str]:
    entries = visible_entries(folder)
    found = [entry.name for entry in entries if os.path.isdir(entry)]
    left_out += [entry for entry in entries if entry.name not in found]
    return found


class _Line(NamedTuple):
    """A line of a list; `name` is the class, from the folder of the image."""

    path: str
    name: str
    label: int
    source: SampleSource


def load_split_lists(config: DataConfig, seed: int) -> DomainData:
    """The samples in the lists below `config.root`; the lists hold the test set, so `seed` draws nothing.

    Classes are numbered as in the lists, up to the largest label. Lines that repeat another of their list or name a
    hidden file (left by macOS) are ignored.

    Raises:
        InputError: a list is missing, or a line cannot be used (the message has file and line).
    """
    root, (below, class_count) = Path(str(config.root)), LAYOUTS[config.source]
    folder = root / below
    present, notes = _listed_domains(folder)
    domains = chosen_domains(config, present, folder)
    first: dict[str | int, _Line] = {}
    lines: list[_Line] = []
    counts: list[int] = []
    files = [folder / f"{domain}_{split}.txt" for domain in domains for split in SPLITS]
    try:
        for file in files:
            kept = _read_list(file, class_count, first, notes)
            lines += kept
            counts.append(len(kept))
    except UnicodeError as error:
        raise InputError(
            f"data.root: found no {_ENCODING} text in {undecodable(files, _ENCODING)}; expected lists"
        ) from error
    labels = np.array([line.label for line in lines], dtype=np.int64)
    if repeated := len(lines) - len({line.path for line in lines}):
        notes.append(f"{folder}: {repeated} images are in several of the lists, and in several parts of the data")
    place = np.repeat(np.arange(len(files)), counts)
    data = DomainData(
        task="image_classification",
        content=image_column([os.path.join(root, line.path) for line in lines]),
        domain_of=place // len(SPLITS),
        domains=list(domains),
        labels=labels,
        # Some labels may have no line.
        classes=[
            first[label].name if label in first else f"class {label}" for label in range(labels.max(initial=-1) + 1)
        ],
        is_test=place % len(SPLITS) == 1,
        sample_sources=sample_sources(line.source for line in lines),
        notes=notes,
    )
    return prepare_source(data, config, seed, split=False)


def _listed_domains(folder: Path) -> tuple[list[str], list[str]]:
    """The domains that have a training list in `folder`, and notes on other files."""
    entries = visible_entries(folder) if folder.is_dir() else []
    names = [entry.name.removesuffix("_train.txt") for entry in entries if entry.name.endswith("_train.txt")]
    if not names:
        below = folder.name
        near = nearby_root_hint(folder.parent, lambda root: any((root / below).glob("*_train.txt")))
        raise InputError(
            f"data.root: found no lists in {str(folder)!r}, expected <domain>_train.txt and _test.txt{near}"
        )
    lists = {f"{name}_{split}.txt" for name in names for split in SPLITS}
    others = [entry for entry in entries if entry.name not in lists]
    return names, left_out_notes(folder, others, "<domain>_train.txt and <domain>_test.txt")


def _read_list(file: Path, classes: int, first: dict[str | int, _Line], notes: list[str]) -> list[_Line]:
    """The lines to use; each must match the earlier lines in `first`, by class name and by label."""
    kept: dict[str, _Line] = {}
    repeated = hidden = 0
    place = f"{file}, line"
    try:
        for number, text in enumerate(text_lines(file, _ENCODING), start=1):
            if not text.strip():
                continue
            line = _parse(text, SampleSource(place, number), classes)
            if os.path.basename(line.path).startswith("."):
                hidden += 1
                continue
            for key in (line.name, line.label):
                known = first.setdefault(key, line)
                if (known.name, known.label) != (line.name, line.label):
                    expected = known.label if key == line.name else repr(known.name)
                    raise InputError(
                        f"data.root: {line.source}: found label {line.label} for {line.name!r}, expected {expected} as "
                        f"in {known.source}"
                    )
            repeated += kept.setdefault(line.path, line) is not line
    except OSError as error:
        raise InputError(
            f"data.root: cannot read {file}: {error.strerror or error}; expected lines of path and label"
        ) from error
    if repeated:
        notes.append(f"{file}: {repeated} of its lines repeat another and count once")
    if hidden:
        notes.append(f"{file}: {hidden} of its lines name hidden files, which do not count")
    return list(kept.values())


def _parse(text: str, source: SampleSource, classes: int) -> _Line:
    found = _LINE.fullmatch(text)
    if found is None:
        raise InputError(f"data.root: {source}: found {text.strip()[:80]!r}, expected a path, a space and a label")
    path, label = found[1], int(found[2])
    if path.startswith("/") or "/../" in f"/{path}":
        raise InputError(f"data.root: {source}: found {path!r}, expected a path that stays below data.root")
    if not 0 <= label < classes:
        raise InputError(f"data.root: {source}: found label {label}, expected one from 0 to {classes - 1}")
    path = os.path.normpath(path)
    return _Line(path, os.path.basename(os.path.dirname(path)), label, source)
