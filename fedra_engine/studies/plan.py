"""Plans of studies: experiments, each with a folder and a lock of its own. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fedra_engine.config import ExperimentConfig
from fedra_engine.config.model import MEASURED
from fedra_engine.runtime.errors import InputError


@dataclass(frozen=True)
class Part:
    """An experiment of a study; `config.name` names its folder."""

    config: ExperimentConfig

    @property
    def path(self) -> Path:
        """The experiment's folder."""
        assert self.config.name is not None
        return Path(self.config.output_dir) / self.config.name

    @property
    def lock_file(self) -> Path:
        """Locked by the process that works on it. It is beside the folder, which may be made and removed."""
        return self.path.with_name(f".{self.path.name}.lock")


@dataclass(frozen=True)
class PlannedRun(Part):
    """A run of a comparison; `label` names its method in tables. A trial only serves to choose a point of the grid."""

    label: str
    is_trial: bool = False

    @property
    def title(self) -> str:
        """The run's name in messages."""
        return f"{self.label} seed {self.config.seed}"


class Candidate(NamedTuple):
    """A point of the grid for an entry of `--methods`.

    Attributes:
        point: its fields and values, for tables.
        at_edge: fields whose value is the smallest or the largest number that the grid has for them.
        trial: run of the first seed on validation samples; None if the entry has no other candidate.
        runs: the entry's runs with this point, one for each seed.
    """

    point: str
    at_edge: tuple[str, ...]
    trial: PlannedRun | None
    runs: tuple[PlannedRun, ...]


class Comparison(NamedTuple):
    """Candidates for each entry, whose runs are executed `jobs` at a time.

    With `oversubscribe` these may be more than there are cores. If it is `quiet`, progress is not printed.
    """

    entries: tuple[tuple[Candidate, ...], ...]
    output_dir: Path
    jobs: int
    oversubscribe: bool
    quiet: bool = False

    @property
    def trials(self) -> list[PlannedRun]:
        """Runs that choose among the candidates of their entry."""
        return [one.trial for candidates in self.entries for one in candidates if one.trial is not None]

    @property
    def runs(self) -> list[PlannedRun]:
        """Runs of all candidates."""
        return seed_by_seed([candidate for candidates in self.entries for candidate in candidates])


def seed_by_seed(candidates: Sequence[Candidate]) -> list[PlannedRun]:
    """The runs of all `candidates` with the first seed, then those with the second, and so on."""
    return [run for of_seed in zip(*(each.runs for each in candidates), strict=True) for run in of_seed]


@dataclass(frozen=True)
class Point(Part):
    """Rounds of `clients` clients to measure for `seconds` seconds on `processes` processes of `threads` threads."""

    clients: int
    processes: int
    threads: int
    seconds: float

    @property
    def title(self) -> str:
        """The point's name in messages."""
        return f"{self.clients:,} clients, {processes_text(self.processes)}"


class Network(NamedTuple):
    """Time of a message between two processes: `latency` seconds plus its bytes over `bandwidth` (bytes/s)."""

    latency: float
    bandwidth: float


class Scaling(NamedTuple):
    """Points by rising numbers of processes and clients, and the numbers of processes to compute times for."""

    points: tuple[Point, ...]
    output_dir: Path
    projected: tuple[int, ...]
    network: Network
    oversubscribe: bool


def processes_text(number: int) -> str:
    """`1 process`, `2 processes`."""
    return f"{number} process{'es' if number > 1 else ''}"


def differences(
    found: Any, expected: Any, irrelevant: Collection[str], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Dotted names and both values of the fields in which two configurations differ, except `irrelevant` ones.

    Where `expected` leaves a choice to a measurement, `found`, of a run, may have any.
    """
    for field in fields(found):
        name, one, other = f"{prefix}{field.name}", getattr(found, field.name), getattr(expected, field.name)
        if name in irrelevant:
            continue
        if is_dataclass(one):
            yield from differences(one, other, irrelevant, f"{name}.")
        elif one != other and not (name in MEASURED and other == "auto"):
            yield name, one, other


def refuse_changes(changes: Iterable[tuple[str, object, object]], where: Path) -> None:
    """Raise InputError for the first of `changes`: a field's name, its value in `where`, and its value now."""
    for field, found, expected in changes:
        raise InputError(
            f"{field}: found {found} in {where}, expected {expected} as this command has it (or another output_dir)"
        )
