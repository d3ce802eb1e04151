"""What a run's folder says about it, in one typed structure, read without torch, data or model."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from fedra_engine.callbacks.run_folder import FACTS, RunFolder, reading
from fedra_engine.config import DataConfig, ExperimentConfig
from fedra_engine.config.data import HeldOut
from fedra_engine.config.values import load_yaml_file
from fedra_engine.federation.averages import average
from fedra_engine.runtime.files import write_whole
from fedra_engine.runtime.measure_text import register_share

_WANTED = "the file of a run as it was written"
LOCATION_SETTINGS = ("name", "output_dir")
"""Settings that say where a run's folder is, and nothing about what was run."""
_OTHER_MAPPINGS = ("accuracy", "allocation", "trained")
"""What is a mapping in a record and is no measure beside the accuracy."""
Blocks = Mapping[int, Sequence[int]]
"""Blocks by client; all are counted from 0."""


@dataclass(frozen=True)
class ClientKind:
    """Counted costs of a round for clients that hold and train equally many blocks, at the same rank.

    Attributes:
        held, trained: numbers of blocks.
        rank: of their adapters.
        clients: how many there are, among those that were counted.
        flops: of a round's training, in the blocks; mean over the clients.
        uploaded, downloaded: bytes of a round; mean over the clients.
        frozen_memory, trained_memory, activation_memory: bytes; largest among the clients (see `ClientCosts`).
    """

    held: int
    trained: int
    rank: int
    clients: int
    flops: float
    uploaded: float
    downloaded: float
    frozen_memory: float
    trained_memory: float
    activation_memory: float

    @property
    def memory(self) -> float:
        """Bytes of training, without temporary memory of single operations."""
        return self.frozen_memory + self.trained_memory + self.activation_memory


@dataclass(frozen=True)
class StartFacts:
    """What is known only while the experiment is in memory, written before its first round.

    Attributes:
        blocks: number of the model's blocks.
        described: model, adapters, clients and so on, in words, by title.
        client_domains, client_capacities, client_ranks, client_samples: of each client; empty for very many clients.
        classes: names; empty where there are no classes, or very many clients.
        label_counts: training samples [classes, clients].
        kinds: the costs of a round by kind of client; empty if they were not counted.
        notes: what is missing here, and why.
        environment: versions and hardware, by name.
        shares: the measures that are read in percent; a run of an older version names none.
    """

    blocks: int
    described: dict[str, str]
    client_domains: list[str]
    client_capacities: list[int]
    client_ranks: list[int]
    client_samples: list[int]
    classes: list[str]
    label_counts: list[list[int]]
    kinds: list[ClientKind]
    notes: list[str]
    environment: dict[str, str]
    shares: list[str] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        """Write the facts into a run's folder."""
        write_whole(folder / FACTS, json.dumps(asdict(self), allow_nan=False) + "\n")

    @classmethod
    def read(cls, folder: Path) -> StartFacts | None:
        """The facts in a run's folder; None for a run of a version that wrote none."""
        file = folder / FACTS
        if not file.exists():
            return None
        with reading(file, _WANTED):
            values = json.loads(file.read_text(encoding="utf-8"))
            return cls(**{**values, "kinds": [ClientKind(**kind) for kind in values["kinds"]]})


@dataclass(frozen=True)
class RoundFacts:
    """A round's record.

    Attributes:
        number: of the round, from 1.
        participants: clients whose update was used.
        loss: mean training loss of a sample; None when nobody trained.
        accuracy: share of correct predictions by domain; empty where the round was not evaluated.
        measures: the other measures of that evaluation, by name and domain; None where one is not defined.
        held, trained: blocks by participant; None where they are not recorded.
        holders, trainers: number of participants that held, or trained, each block; empty where they are not recorded.
        bad, late, dropped: participants whose update was not finite, arrived too late, or never.
        simulated_seconds: on the clients' devices, where these are simulated.
    """

    number: int
    participants: int
    loss: float | None
    seconds: float
    accuracy: Mapping[str, float]
    measures: Mapping[str, Mapping[str, float | None]]
    held: Blocks | None
    trained: Blocks | None
    holders: Sequence[int]
    trainers: Sequence[int]
    bad: int
    late: int
    dropped: int
    simulated_seconds: float | None


class BestRound(NamedTuple):
    """The evaluated round that was kept as the best one: its number, from 1, by which measure, and its accuracies."""

    number: int
    measure: str
    accuracy: Mapping[str, float]


class Totals(NamedTuple):
    """Counted costs of all clients over all rounds: FLOPs, and bytes sent to and by the server."""

    flops: float
    uploaded: float
    downloaded: float


@dataclass(frozen=True)
class RunFacts:
    """All that is known of a run.

    Attributes:
        name: of its folder.
        path: the folder.
        settings: every field of its configuration, by dotted name.
        defaults: the same of the embedded experiment.
        rounds: the records.
        frozen, tuned: accuracy by domain before and after training; empty for a run that has not ended.
        summary: the other content of `summary.json`.
        start: None for a run of a version that wrote no such facts.
    """

    name: str
    path: Path
    settings: Mapping[str, Any]
    defaults: Mapping[str, Any]
    rounds: Sequence[RoundFacts]
    frozen: Mapping[str, float]
    tuned: Mapping[str, float]
    summary: Mapping[str, Any]
    start: StartFacts | None

    @property
    def changed(self) -> dict[str, tuple[Any, Any]]:
        """Value and default of the settings that differ from the embedded experiment."""
        both = ((name, value, self.defaults.get(name)) for name, value in self.settings.items())
        return {name: (value, usual) for name, value, usual in both if value != usual and name not in LOCATION_SETTINGS}

    @property
    def method(self) -> str:
        """`method.name`."""
        return str(self.settings.get("method.name", ""))

    @property
    def best(self) -> BestRound | None:
        """The best round; None if none was kept."""
        found = self.summary.get("best")
        return None if not found else BestRound(found["round"] + 1, found["measure"], found["accuracy"])

    @property
    def held_out(self) -> HeldOut:
        """Which samples were evaluated."""
        return DataConfig(validation_fraction=self.settings.get("data.validation_fraction", 0.0)).held_out

    @property
    def has_ended(self) -> bool:
        """Whether it has results."""
        return bool(self.tuned)

    @property
    def curve(self) -> dict[int, Mapping[str, float]]:
        """Accuracy by domain, by number of rounds trained, wherever it was measured."""
        before = {0: self.frozen} if self.frozen else {}
        return before | {each.number: each.accuracy for each in self.rounds if each.accuracy}

    def measured(self, name: str) -> dict[int, float]:
        """A measure beside the accuracy, on average over the domains, by number of rounds trained; where defined."""
        frozen = self.summary.get("measures", {}).get(name, {}).get("frozen")
        known = {0: frozen} | {each.number: each.measures.get(name) for each in self.rounds}
        found = {number: average(of_domain) for number, of_domain in known.items() if of_domain}
        return {number: value for number, value in found.items() if math.isfinite(value)}

    @property
    def seconds(self) -> float:
        """Wall-clock time of the rounds, without evaluations."""
        return sum(each.seconds for each in self.rounds)

    @property
    def block_changes(self) -> list[float] | None:
        """How far tuning has moved each block's weights, [blocks]; None where that is not known."""
        return self.summary.get("block_changes")

    @property
    def totals(self) -> Totals | None:
        """The costs of the run, if those of its kinds of clients were counted.

        Every participation costs what its kind of client costs in the first round; where single participations are not
        recorded, what a client costs on average.
        """
        kinds = self.start.kinds if self.start is not None else []
        if self.start is None or not kinds:
            return None
        by_kind = {(kind.held, kind.trained, kind.rank): _costs(kind) for kind in kinds}
        counted = sum(kind.clients for kind in kinds)
        usual = [sum(_costs(kind)[part] * kind.clients for kind in kinds) / counted for part in range(3)]
        total = [0.0, 0.0, 0.0]
        for each in self.rounds:
            costs = [by_kind.get(key, usual) for key in _kinds_of(each, self.start)]
            costs = costs or [usual] * each.participants
            total = [so_far + sum(cost[part] for cost in costs) for part, so_far in enumerate(total)]
        return Totals(*total)


def worst(accuracy: Mapping[str, float]) -> str:
    """The domain of the lowest accuracy."""
    return min(accuracy, key=accuracy.__getitem__)


def read_run(path: Path) -> RunFacts:
    """Read the run in a folder, also one that has not ended.

    Raises:
        InputError: there is no run, or a file of it is damaged.
    """
    folder = RunFolder.open(path)
    start, summary, known = StartFacts.read(path), dict[str, Any](), list[RoundFacts]()
    # Where the code of a metric does not run, nothing else says that it is a share.
    for name in start.shares if start is not None else []:
        register_share(name)
    settings = dict(_flat(load_yaml_file("config", str(folder.config_file))))
    with reading(folder.metrics_file, _WANTED):
        known = [_round(record) for record in folder.read_metrics()]
    if folder.summary_file.exists():
        with reading(folder.summary_file, _WANTED):
            summary = dict(json.loads(folder.summary_file.read_text(encoding="utf-8")))
            frozen, tuned = ({str(k): float(v) for k, v in summary.pop(name).items()} for name in ("frozen", "tuned"))
    else:
        frozen, tuned = {}, {}
    defaults = dict(_flat(asdict(ExperimentConfig())))
    return RunFacts(path.resolve().name, path, settings, defaults, known, frozen, tuned, summary, start)


def _round(record: Mapping[str, Any]) -> RoundFacts:
    """The facts in a line of metrics.jsonl; LookupError, TypeError or ValueError if they are not there."""
    held, trained = (_by_client(record.get(name)) for name in ("allocation", "trained"))
    holders = record.get("holders") or _counts(held)
    return RoundFacts(
        number=int(record["round"]) + 1,
        participants=int(record["participants"]),
        loss=None if record["loss"] is None else float(record["loss"]),
        seconds=float(record["seconds"]),
        accuracy={str(domain): float(value) for domain, value in record.get("accuracy", {}).items()},
        measures={
            str(name): {str(domain): None if value is None else float(value) for domain, value in found.items()}
            for name, found in record.items()
            if isinstance(found, Mapping) and name not in _OTHER_MAPPINGS
        },
        held=held,
        trained=held if trained is None else trained,
        holders=holders,
        trainers=holders if trained is None else _counts(trained),
        bad=int(record.get("bad_updates") or 0),
        late=int(record.get("late") or 0),
        dropped=int(record.get("dropped") or 0),
        simulated_seconds=record.get("simulated_seconds"),
    )


def _by_client(blocks: Mapping[str, Sequence[int]] | None) -> Blocks | None:
    return None if blocks is None else {int(client): list(each) for client, each in blocks.items()}


def _counts(of: Blocks | None) -> list[int]:
    """How often each block is among those `of` the clients, up to the last that is."""
    blocks = [block for each in (of or {}).values() for block in each]
    counts = [0] * (max(blocks, default=-1) + 1)
    for block in blocks:
        counts[block] += 1
    return counts


def _kinds_of(each: RoundFacts, start: StartFacts) -> Iterator[tuple[int, int, int]]:
    """Blocks held and trained and the rank of each participant of a round, where they are known."""
    if each.held is None or each.trained is None or not start.client_ranks:
        return
    for client, held in each.held.items():
        yield len(held), len(each.trained[client]), start.client_ranks[client]


def _costs(kind: ClientKind) -> list[float]:
    return [kind.flops, kind.uploaded, kind.downloaded]


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Values by dotted name, from a tree of groups."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, list(value) if isinstance(value, tuple) else value
