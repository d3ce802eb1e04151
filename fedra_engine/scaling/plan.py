"""What the command line of `scaling` asks for: numbers of clients and processes, one measured point for each pair.

Nothing here imports torch, so that `--help` and a mistyped option answer at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedra_engine.commands.parsing import (
    OVERSUBSCRIBE,
    LauncherOption,
    Parser,
    check_different,
    check_not_given,
    parse_option,
    split_options,
)
from fedra_engine.config import ExperimentConfig
from fedra_engine.config.options import COUNT, number
from fedra_engine.config.validation import validate, validate_together
from fedra_engine.runtime.errors import InputError

DESCRIPTION = """Measure rounds of more and more clients, all of which take part, on one or several processes.

--clients takes the numbers of clients, as in --clients 10,100,1000. Each point is measured in processes of its own,
which start with fresh memory. Clients draw their samples with replacement when they are trained (data.partition
bootstrap), so nothing is stored of them. All other options are those of simulate. What is measured is not measured
again; the tables and the plot, in <output_dir>, are those of the latest command.
"""
_OUTPUT_DIR = "runs/scaling"
_OPTIONS = (
    LauncherOption("clients", "N,…", "Numbers of clients"),
    LauncherOption("processes", "N,…", "Numbers of processes; several are started by torchrun", default="1"),
    LauncherOption("threads", "N", "Threads of each process, on a CPU", default="1"),
    OVERSUBSCRIBE,
    LauncherOption("seconds", "S", "How long rounds are measured; at least one is", default="10"),
    LauncherOption("projected", "N,…", "Numbers of processes for which times are computed", default="1,2,4,8,16,32,64"),
    LauncherOption("latency", "SECONDS", "Of a message between two processes, for the computed times", default="2e-5"),
    LauncherOption("bandwidth", "GB/S", "Between two processes, for the computed times", default="10"),
)
_POSITIVE = number(0, 1e6, above=True)
"""Seconds, up to eleven days, and GB/s, more than any network has."""
_PLANNED = (
    "data.partition",
    "data.clients",
    "data.clients_per_domain",
    "clients.sampling",
    "clients.participants",
    "name",
)
"""Fields that the study sets itself."""


@dataclass(frozen=True)
class Network:
    """What a message between two processes takes: `latency` seconds, and its bytes over `bandwidth` (bytes/s)."""

    latency: float
    bandwidth: float


@dataclass(frozen=True)
class Point:
    """One measurement.

    Attributes:
        clients: of the round.
        processes: of the job.
        threads: of each process.
        seconds: for which rounds are measured.
        config: of the experiment; name and output folder are the point's.
    """

    clients: int
    processes: int
    threads: int
    seconds: float
    config: ExperimentConfig

    @property
    def title(self) -> str:
        """How messages call it."""
        return f"{self.clients:,} clients, {self.processes} process{'es' if self.processes > 1 else ''}"

    @property
    def path(self) -> Path:
        """Its folder."""
        assert self.config.name is not None
        return Path(self.config.output_dir) / self.config.name

    @property
    def lock_file(self) -> Path:
        """Held by the command that is measuring it."""
        return self.path.with_name(f".{self.path.name}.lock")


@dataclass(frozen=True)
class Study:
    """The points, few processes and few clients first; their folder; and what times are computed for.

    With `oversubscribe`, processes may share cores.
    """

    points: tuple[Point, ...]
    output_dir: Path
    projected: tuple[int, ...]
    network: Network
    oversubscribe: bool


def parse_study(arguments: Sequence[str]) -> Study:
    """Read the options of `scaling`: those of an experiment, and its own.

    Raises:
        InputError: the options cannot be used.
    """
    options, others = split_options(arguments, _OPTIONS)
    # Answers --help and --print_config, too.
    config = Parser(ExperimentConfig, DESCRIPTION, _OPTIONS, {"output_dir": _OUTPUT_DIR}).parse(others)
    check_not_given(others, dict.fromkeys(_PLANNED, "--clients"))
    if options.clients is None:
        raise InputError("clients: found none, expected numbers of clients (--clients 10,100,1000)")
    clients, processes, projected = (
        _parse_counts(name, getattr(options, name)) for name in ("clients", "processes", "projected")
    )
    threads = parse_option("threads", options.threads, int, COUNT)
    seconds, latency, bandwidth = (
        parse_option(name, getattr(options, name), float, _POSITIVE) for name in ("seconds", "latency", "bandwidth")
    )
    pairs = [(some, of) for of in processes for some in clients]
    # Options of another partition or sampling do nothing in a point.
    _, *configs = validate_together([config, *(_point_config(config, *pair) for pair in pairs)])
    points = tuple(Point(*pair, threads, seconds, of_point) for pair, of_point in zip(pairs, configs, strict=True))
    for point in points:
        validate(point.config)
        if point.processes > point.clients:
            raise InputError(
                f"processes: found {point.processes} with clients {point.clients}, expected at most one for each client"
            )
    network = Network(latency, bandwidth * 1e9)
    return Study(points, Path(config.output_dir), projected, network, options.oversubscribe == "true")


def _point_config(config: ExperimentConfig, clients: int, processes: int) -> ExperimentConfig:
    """The same experiment with `clients` clients, all of which take part."""
    return replace(
        config,
        name=f"{clients}-clients-{processes}-processes",
        data=replace(config.data, partition="bootstrap", clients=clients),
        clients=replace(config.clients, sampling="uniform", participants=None),
    )


def _parse_counts(option: str, text: str) -> tuple[int, ...]:
    counts = [parse_option(option, entry, int, COUNT) for entry in text.split(",")]
    check_different(option, counts)
    return tuple(sorted(counts))
