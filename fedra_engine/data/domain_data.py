"""`DomainData`, which every source yields, and the steps that all sources share: names, domains, classes, test set."""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from itertools import combinations
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedra_engine.config import DataConfig
from fedra_engine.runtime.errors import InputError, count_of, first_few
from fedra_engine.runtime.randomness import generator

if TYPE_CHECKING:
    from datasets import Dataset

DataTask = Literal["image_classification", "text_classification", "causal_lm"]

_NUMBER = re.compile(r"[+-]?[0-9]{1,15}(\.[0-9]{0,10})?")
"""A class name that is read as a number; one with more digits is not."""
_LARGEST = 2**53
"""From here on, not every whole number is a float."""
_CHARACTERS = 80
_NAMES = 8
"""Limits of a message: characters of a value, and names in a list."""


class SampleSource(NamedTuple):
    """A line of a file or a row of a split: `place`, such as `<file>, line`, and its number."""

    place: str
    number: int

    def __str__(self) -> str:
        return f"{self.place} {self.number}"


@dataclass(frozen=True)
class DomainData:
    """The samples of a federated data source before preprocessing; `prepare_source` has sorted them by domain.

    Attributes:
        task: determines the columns of `content`.
        content: a `Dataset` with `image` for image_classification, `text` for text_classification, `prompt` and
            `response` for causal_lm (the prompt may be empty), or `messages` (JSON) and `response`; or grey images of
            any size, uint8 [samples, height, width]; or images in the model's size and channels, uint8
            [samples, channels, height, width].
        domain_of: int64 [samples], index into `domains`.
        domains: names; client capacities follow this order.
        labels: int64 [samples], index into `classes`; None for samples without labels.
        classes: names.
        is_test: bool [samples], whether a sample belongs to the test set, or to the validation set in its place.
        clients: [samples], name of the client that owns a sample; None if the source names no clients.
        sample_sources: [samples], file and line (or split and row) of each sample, made by `sample_sources()`; None
            if the image's own path says enough, or the samples are generated.
        fingerprint: identifies the data set that `sample_sources` point into; None if the contents are separate files
            or generated.
        notes: log lines about entries of the source that were left out.
        given_as: the option or argument that named the samples, for messages.
    """

    task: DataTask
    content: Dataset | NDArray[np.uint8]
    domain_of: NDArray[np.int64]
    domains: list[str]
    labels: NDArray[np.int64] | None
    classes: list[str]
    is_test: NDArray[np.bool_]
    clients: NDArray[np.str_] | None = None
    sample_sources: NDArray[np.void] | None = None
    fingerprint: str | None = None
    notes: list[str] = field(default_factory=list)
    given_as: str = "data.root"

    def __repr__(self) -> str:
        parts = f"{count_of(len(self.domain_of), 'sample')} in {count_of(len(self.domains), 'domain')}"
        return f"DomainData({self.task}: {parts})"

    def __len__(self) -> int:
        return len(self.domain_of)

    @property
    def train(self) -> DomainData:
        """The training samples."""
        return self.select(np.flatnonzero(~self.is_test))

    @property
    def test(self) -> DomainData:
        """The test samples."""
        return self.select(np.flatnonzero(self.is_test))

    def select(self, rows: NDArray[np.int64]) -> DomainData:
        """The samples `rows`; indices of domains and classes stay the same."""
        columns = ("domain_of", "is_test", "labels", "clients", "sample_sources")
        known = {name: values for name in columns if (values := getattr(self, name)) is not None}
        content = self.content[rows] if isinstance(self.content, np.ndarray) else self.content.select(rows)
        return replace(self, content=content, **{name: values[rows] for name, values in known.items()})

    def describe(self, row: int, kind: str) -> str:
        """Where sample `row` is from; `<kind> <row>` if that is not known."""
        return f"{kind} {row}" if self.sample_sources is None else str(SampleSource(*self.sample_sources[row]))


def sample_sources(sources: Iterable[SampleSource]) -> NDArray[np.void]:
    """A structured array [samples] of `SampleSource`'s fields, 16 bytes each."""
    return np.fromiter(sources, dtype=[("place", object), ("number", np.int64)])


def is_missing(value: object) -> bool:
    """Whether a cell is null, NaN or blank. Words such as "NA" or "null" are texts."""
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def name_of(value: object, role: str, column: str, source: SampleSource) -> str:
    """The name of a domain, client or class (`role` is domain, client or label), stripped; "" for a missing client.

    Whole numbers are names, even as floats, since a column with missing values holds floats; other values raise
    InputError. Class names that are numbers are normalised: 1, 1.0 and 01 all become 1.
    """
    missing = is_missing(value)
    if missing and role == "client":
        return ""
    if isinstance(value, float) and value.is_integer() and abs(value) < _LARGEST:
        value = int(value)
    if missing or isinstance(value, bool) or not isinstance(value, str | int):
        found = f"no {role}" if missing else repr(value)[:_CHARACTERS]
        raise InputError(
            f"data.columns.{role}: {source}: found {found} in column {column!r}, expected a name or a whole number"
        )
    name = str(value).strip()
    if role == "label" and _NUMBER.fullmatch(name):
        number = Decimal(name)
        name = str(int(number)) if number == int(number) else f"{number.normalize():f}"
    return sys.intern(name)


def listed(names: Collection[str]) -> str:
    """The first of `names`, for a message, and the number of the rest.

    Names with combining accents (not in NFC) are escaped, since they look like others.
    """
    shortened = (name[:_CHARACTERS] for name in names)
    quoted = [repr(name) if unicodedata.is_normalized("NFC", name) else ascii(name) for name in shortened]
    return first_few(quoted, _NAMES)


def encode_names(names: Sequence[str], unique: list[str] | None = None) -> tuple[NDArray[np.int64], list[str]]:
    """Indices [samples] of `names` into `unique`, and `unique`: by default numbers by value, then texts, sorted."""

    def key(name: str) -> tuple[bool, Decimal, str]:
        is_number = _NUMBER.fullmatch(name) is not None
        return not is_number, Decimal(name if is_number else 0), name

    if unique is None:
        unique = sorted(set(names), key=key)
    index_of = {name: index for index, name in enumerate(unique)}
    return np.array([index_of[name] for name in names], dtype=np.int64), unique


def prepare_source(data: DomainData, config: DataConfig, seed: int, *, split: bool) -> DomainData:
    """Keep the domains and classes that `config` asks for, sort by domain, and hold out a test set if `split`.

    Raises:
        InputError: a domain is unknown or has no training or test samples, or the classes of the training and test
            sets do not fit.
    """
    if names := config.domains:
        if unknown := [name for name in names if name not in data.domains]:
            raise InputError(f"data.domains: found {unknown[0]!r}, expected some of {listed(data.domains)}")
        index_of = np.full(len(data.domains), -1)
        index_of[[data.domains.index(name) for name in names]] = np.arange(len(names))
        data = data.select(np.flatnonzero(index_of[data.domain_of] >= 0))
        data = replace(data, domain_of=index_of[data.domain_of], domains=list(names))
    if config.classes is not None:
        if data.labels is None:
            raise InputError(f"data.classes: found {config.classes} with samples that have no class, expected null")
        data = data.select(np.flatnonzero(data.labels < config.classes))
        data = replace(data, classes=data.classes[: config.classes])
    if (np.diff(data.domain_of) < 0).any():
        # A part of the cache has one domain.
        data = data.select(np.argsort(data.domain_of, kind="stable"))
    if split:
        data = replace(data, is_test=_hold_out(data, "test", config.test_fraction, seed))
    elif config.test_fraction != (usual := DataConfig.test_fraction):
        raise InputError(
            f"data.test_fraction: found {config.test_fraction:g} with samples that have a test set, expected {usual:g} "
            "(none is drawn)"
        )
    check_domains(data)
    if data.labels is not None and data.task != "causal_lm":
        _check_classes(data, data.labels)
        data = replace(data, notes=[*data.notes, *_check_spelling(data, data.labels)])
    return data


def check_domains(data: DomainData, *, with_test: bool = True) -> None:
    """Raise InputError unless every domain has training and, `with_test`, test samples."""
    for index, name in enumerate(data.domains):
        is_test = data.is_test[data.domain_of == index]
        for kind, present in (("training", not is_test.all()), ("test", is_test.any() or not with_test)):
            if not present:
                raise InputError(
                    f"{data.given_as}: found no {kind} samples of domain {name!r}, expected some in every domain"
                )


def with_validation(data: DomainData, config: DataConfig, seed: int) -> DomainData:
    """Put `config.validation_fraction` of the training samples in the place of the test set, which is left out.

    Raises:
        InputError: a domain has too few training samples.
    """
    if config.validation_fraction == 0:
        return data
    left_out, data = int(data.is_test.sum()), data.train
    data = replace(data, is_test=_hold_out(data, "validation", config.validation_fraction, seed))
    note = (
        f"accuracies are those on {data.is_test.sum():,} validation samples, which are taken out of training; the "
        f"{left_out:,} test samples are not used"
    )
    return replace(data, notes=[*data.notes, note])


def _hold_out(data: DomainData, kind: str, fraction: float, seed: int) -> NDArray[np.bool_]:
    """Draw `fraction` of every class of every domain, at least one sample but never all of them: bool [samples].

    Without labels each domain is one class. The draw of a class depends only on the seed, the `kind` of samples (test
    or validation), the names of its domain and class, and its number of samples.
    """
    is_test = np.zeros(len(data), dtype=np.bool_)
    labels = np.zeros(len(data), dtype=np.int64) if data.labels is None else data.labels
    for domain, name in enumerate(data.domains):
        rows = np.flatnonzero(data.domain_of == domain)
        for label in np.unique(labels[rows]):
            members = rows[labels[rows] == label]
            purpose = name if data.labels is None else f"{name}/{data.classes[label]}"
            rng = generator(seed, purpose=f"{kind} split of {purpose}")
            held_out = min(max(round(fraction * len(members)), 1), len(members) - 1)
            is_test[members] = rng.permutation(len(members)) < held_out
        if len(rows) and not is_test[rows].any():
            raise InputError(
                f"data.{kind}_fraction: found {fraction} but no {kind} sample in domain {name!r}, whose classes have "
                f"one{'' if kind == 'test' else ' training'} sample each, expected a class of at least 2"
            )
    return is_test


def _check_classes(data: DomainData, labels: NDArray[np.int64]) -> None:
    """Raise InputError if the test set has classes that the training set lacks."""
    trained, tested = np.unique(labels[~data.is_test]), np.unique(labels[data.is_test])
    if len(unknown := np.setdiff1d(tested, trained)):
        row = np.flatnonzero(data.is_test & (labels == unknown[0]))[0]
        first = "" if data.sample_sources is None else f" (first in {data.describe(row, 'sample')})"
        found, expected = (listed([data.classes[index] for index in indices]) for indices in (unknown, trained))
        raise InputError(
            f"{data.given_as}: found the classes {found} in the test set alone{first}, expected those of the training "
            f"set: {expected}"
        )


def _check_spelling(data: DomainData, labels: NDArray[np.int64]) -> list[str]:
    """Notes on classes with similar names.

    Similar names that never occur in one domain are taken for one class spelt in several ways: an InputError.
    """
    spellings: dict[str, list[int]] = {}
    for index, name in enumerate(data.classes):
        # Ignores differences in case, separators and Unicode form.
        folded = unicodedata.normalize("NFKC", name).casefold().replace("_", " ").replace("-", " ")
        spellings.setdefault(folded, []).append(index)
    notes = []
    for alike in spellings.values():
        if len(alike) > 1:
            names = listed([data.classes[index] for index in alike])
            domains = [set(data.domain_of[labels == index].tolist()) for index in alike]
            if all(domains) and not any(one & other for one, other in combinations(domains, 2)):
                places = ", ".join(data.domains[min(having)] for having in domains)
                raise InputError(
                    f"{data.given_as}: found the classes {names} in different domains ({places}), expected one spelling"
                )
            notes.append(f"classes: {names} are different ones, though they are spelt alike")
    return notes
