"""Images in lists: DomainNet and NICO++, whose `<domain>_{train,test}.txt` have a path and a label on every line."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fedra_engine.config import DataConfig
from fedra_engine.data.domain_data import DomainData, prepare_source
from fedra_engine.data.images import image_column
from fedra_engine.data.names import SampleSource, sample_sources
from fedra_engine.data.sources.tables import check_chosen, left_out_notes, text_lines, undecodable, visible_entries
from fedra_engine.runtime.errors import InputError

LAYOUTS = {"domainnet": ("splits", 345), "nicopp": ("NICO_DG_official", 60)}
"""Folder of the lists below the root, to which their paths are relative, and number of classes of each benchmark."""
_SPLITS = ("train", "test")
_ENCODING = "utf-8"
_LINE = re.compile(r"\s*(\S.*?)\s+(-?\d{1,18})\s*")
_NOTHING = re.compile(r"(?<![^/])\./|(?<=/)/+")
"""What changes nothing in a path. (`PurePosixPath` leaves it out, too, but reading lists would take twice as long.)"""


class _Line(NamedTuple):
    path: str
    label: int
    source: SampleSource

    @property
    def name(self) -> str:
        """Of the class: the folder that the image is in."""
        return self.path.rpartition("/")[0].rpartition("/")[2]


def load_split_lists(config: DataConfig, seed: int) -> DomainData:
    """The samples that the lists below `config.root` name; images stay encoded on disk.

    Labels are the lists' own; the classes are those up to the largest. A line that is in a list twice counts once, and
    one that names a hidden file, as macOS leaves them, not at all.

    Raises:
        InputError: a list that is missing or has a line that cannot be used (the message has file and line).
    """
    assert config.root is not None
    root, (below, class_count) = Path(config.root), LAYOUTS[config.source]
    folder = root / below
    present, notes = _domains(folder)
    check_chosen(config.domains, present, folder)
    domains = config.domains or present
    first: dict[str | int, _Line] = {}
    lines: list[_Line] = []
    counts: list[int] = []
    files = [folder / f"{domain}_{split}.txt" for domain in domains for split in _SPLITS]
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
        domain_of=place // len(_SPLITS),
        domains=list(domains),
        labels=labels,
        # Also of labels that no line has.
        classes=[
            first[label].name if label in first else f"class {label}" for label in range(labels.max(initial=-1) + 1)
        ],
        is_test=place % len(_SPLITS) == 1,
        sample_sources=sample_sources(line.source for line in lines),
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


def _read_list(file: Path, classes: int, first: dict[str | int, _Line], notes: list[str]) -> list[_Line]:
    """The lines that count; `first` has the first line of every class's name and label, with which all others agree."""
    kept: dict[str, _Line] = {}
    repeated = hidden = 0
    try:
        for number, text in enumerate(text_lines(file, _ENCODING), start=1):
            if not text.strip():
                continue
            line = _parse(text, SampleSource(f"{file}, line", number), classes)
            if line.path.rpartition("/")[2].startswith("."):
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
    # Names may have spaces: only the last one separates.
    found = _LINE.fullmatch(text)
    if found is None:
        raise InputError(f"data.root: {source}: found {text.strip()[:80]!r}, expected a path, a space and a label")
    path, label = _NOTHING.sub("", found[1]), int(found[2])
    if path.startswith("/") or "/../" in f"/{path}":
        raise InputError(f"data.root: {source}: found {path!r}, expected a path that stays below data.root")
    if not 0 <= label < classes:
        raise InputError(f"data.root: {source}: found label {label}, expected one from 0 to {classes - 1}")
    return _Line(path, label, source)
