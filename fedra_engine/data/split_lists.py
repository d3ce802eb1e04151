"""Images in lists: DomainNet and NICO++, whose `<domain>_{train,test}.txt` have a path and a label on every line."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fedra_engine.config import DataConfig
from fedra_engine.data.domain_data import DomainData, prepare_source
from fedra_engine.data.folders import check_chosen, left_out_notes, visible_entries
from fedra_engine.data.images import image_column
from fedra_engine.data.origins import Origin, Origins
from fedra_engine.data.tables import text_lines, undecodable
from fedra_engine.runtime.errors import InputError


@dataclass(frozen=True)
class ListLayout:
    """How a benchmark is laid out on disk.

    Attributes:
        folder: where its lists are, below the root; paths in them are relative to the root.
        classes: how many classes it has.
    """

    folder: str
    classes: int


LAYOUTS = {"domainnet": ListLayout("splits", 345), "nicopp": ListLayout("NICO_DG_official", 60)}
_SPLITS = ("train", "test")
_ENCODING = "utf-8"
_LINE = re.compile(r"\s*(\S.*?)\s+(-?\d{1,18})\s*")
_NOTHING = re.compile(r"(?<![^/])\./|(?<=/)/+")
"""What changes nothing in a path. (`PurePosixPath` leaves it out, too, but reading lists would take twice as long.)"""


class _Line(NamedTuple):
    path: str
    label: int
    origin: Origin


@dataclass
class _ClassNames:
    """Which folder holds which label; every line must agree."""

    label_of: dict[str, tuple[int, Origin]] = field(default_factory=dict)
    name_of: dict[int, tuple[str, Origin]] = field(default_factory=dict)

    def note(self, name: str, label: int, origin: Origin) -> None:
        known_label, at = self.label_of.setdefault(name, (label, origin))
        if known_label != label:
            raise InputError(
                f"data.root: {origin}: found label {label} for {name!r}, expected {known_label} as in {at}"
            )
        known_name, at = self.name_of.setdefault(label, (name, origin))
        if known_name != name:
            raise InputError(
                f"data.root: {origin}: found label {label} for {name!r}, expected {known_name!r} as in {at}"
            )

    def names(self, count: int) -> list[str]:
        """Name of every label below `count`, also of those that no line has."""
        return [self.name_of[label][0] if label in self.name_of else f"class {label}" for label in range(count)]


def load_split_lists(config: DataConfig, seed: int) -> DomainData:
    """The samples that the lists below `config.root` name; images stay encoded on disk.

    Labels are the lists' own; the classes are those up to the largest. A line that is in a list twice counts once, and
    one that names a hidden file, as macOS leaves them, not at all.

    Raises:
        InputError: a list that is missing or has a line that cannot be used (the message has file and line).
    """
    assert config.root is not None
    layout, root = LAYOUTS[config.source], Path(config.root)
    folder = root / layout.folder
    present, notes = _domains(folder)
    check_chosen(config.domains, present, folder)
    domains = config.domains or present
    names = _ClassNames()
    lines: list[_Line] = []
    domain_of: list[int] = []
    is_test: list[bool] = []
    files = [folder / f"{domain}_{split}.txt" for domain in domains for split in _SPLITS]
    for place, file in enumerate(files):
        kept: dict[str, _Line] = {}
        repeated = hidden = 0
        try:
            for line in _read_list(file, layout.classes):
                above, _, name = line.path.rpartition("/")
                if name.startswith("."):
                    hidden += 1
                    continue
                names.note(above.rpartition("/")[2], line.label, line.origin)
                repeated += kept.setdefault(line.path, line) is not line
        except UnicodeError as error:
            raise InputError(
                f"data.root: found no {_ENCODING} text in {undecodable(files, _ENCODING)}; expected lists"
            ) from error
        if repeated:
            notes.append(f"{file}: {repeated} of its lines repeat another and count once")
        if hidden:
            notes.append(f"{file}: {hidden} of its lines name hidden files, which do not count")
        lines += kept.values()
        domain_of += [place // len(_SPLITS)] * len(kept)
        is_test += [file.name.endswith("_test.txt")] * len(kept)
    labels = np.array([line.label for line in lines], dtype=np.int64)
    if repeated := len(lines) - len({line.path for line in lines}):
        notes.append(f"{folder}: {repeated} images are in several of the lists, and in several parts of the data")
    data = DomainData(
        task="image_classification",
        content=image_column([os.path.join(root, line.path) for line in lines]),
        domain_of=np.array(domain_of, dtype=np.int64),
        domains=list(domains),
        labels=labels,
        classes=names.names(int(labels.max(initial=-1)) + 1),
        is_test=np.array(is_test, dtype=np.bool_),
        origins=Origins.of(line.origin for line in lines),
        notes=notes,
    )
    return prepare_source(data, config, seed, split=False)


def _domains(folder: Path) -> tuple[list[str], list[str]]:
    """The domains that have a training list in `folder`, and a note on other files."""
    entries = visible_entries(folder) if folder.is_dir() else []
    names = [entry.name.removesuffix("_train.txt") for entry in entries if entry.name.endswith("_train.txt")]
    if not names:
        raise InputError(f"data.root: found no lists in {str(folder)!r}, expected <domain>_train.txt and _test.txt")
    lists = {f"{name}_{split}.txt" for name in names for split in _SPLITS}
    others = [entry for entry in entries if entry.name not in lists]
    return names, left_out_notes(folder, others, "<domain>_train.txt and <domain>_test.txt")


def _read_list(file: Path, classes: int) -> Iterator[_Line]:
    try:
        for number, line in enumerate(text_lines(file, _ENCODING), start=1):
            if line.strip():
                yield _parse(line, Origin(f"{file}, line", number), classes)
    except OSError as error:
        raise InputError(
            f"data.root: cannot read {file}: {error.strerror or error}; expected lines of path and label"
        ) from error


def _parse(line: str, origin: Origin, classes: int) -> _Line:
    # Names may have spaces: only the last one separates.
    found = _LINE.fullmatch(line)
    if found is None:
        raise InputError(f"data.root: {origin}: found {line.strip()[:80]!r}, expected a path, a space and a label")
    path, label = _NOTHING.sub("", found[1]), int(found[2])
    if path.startswith("/") or "/../" in f"/{path}":
        raise InputError(f"data.root: {origin}: found {path!r}, expected a path that stays below data.root")
    if not 0 <= label < classes:
        raise InputError(f"data.root: {origin}: found label {label}, expected one from 0 to {classes - 1}")
    return _Line(path, label, origin)
