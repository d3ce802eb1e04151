"""`scale`: read which numbers of clients and processes to measure, one point for each pair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fedra_engine.config import ExperimentConfig
from fedra_engine.config.options import COUNT, number
from fedra_engine.config.parsing import (
    OVERSUBSCRIBE,
    CommandOption,
    Parser,
    check_different,
    parse_option,
    split_options,
)
from fedra_engine.config.validation import validate, validate_together
from fedra_engine.runtime.errors import InputError
from fedra_engine.runtime.quick_imports import quick_imports
from fedra_engine.studies.plan import Network, Point, Scaling

DESCRIPTION = """Measure rounds of more and more clients, all of which take part, on one or several processes.

--clients takes the numbers of clients, as in --clients 10,100,1000. Each point is measured in processes of its own,
which start with fresh memory. Clients draw their samples with replacement when they are trained (data.partition
bootstrap), so nothing is stored of them. Beside the options below, it takes the fields of the configuration, except
those it sets itself (--help_all lists what is taken). What is measured is not measured again; the tables and the plot,
in <output_dir>, are those of the latest command.
"""
_OPTIONS = (
    CommandOption("clients", "N,…", "Numbers of clients"),
    CommandOption("processes", "N,…", "Numbers of processes of this machine", default="1"),
    CommandOption("threads", "N", "Threads of each process, on a CPU", default="1"),
    OVERSUBSCRIBE,
    CommandOption("seconds", "S", "How long rounds are measured; at least one is", default="10"),
    CommandOption("projected", "N,…", "Numbers of processes for which times are computed", default="1,2,4,8,16,32,64"),
    CommandOption("latency", "SECONDS", "Of a message between two processes, for the computed times", default="2e-5"),
    CommandOption("bandwidth", "GB/S", "Between two processes, for the computed times", default="10"),
)
_POSITIVE = number(0, 1e6, above=True)
"""Seconds or GB/s."""
_REFUSED = dict.fromkeys(("data.clients", "data.clients_per_domain"), "--clients to set it")
_REFUSED |= dict.fromkeys(
    ("data.partition", "clients.sampling", "clients.participants", "name"), "none: the study sets it itself"
)
_REFUSED |= dict.fromkeys(
    ("report_to", "evaluate_every", "trace", "keep_best", "early_stopping"),
    "none: rounds are timed, but none is evaluated or kept",
)
"""Fields and groups, and what is expected in their place."""
PARSER = Parser(ExperimentConfig, DESCRIPTION, _OPTIONS, {"output_dir": "runs/scaling"}, refused=_REFUSED)


def main(arguments: Sequence[str]) -> None:
    """Measure the points that `arguments` ask for and that have not been measured, and report on all of them."""
    scaling = parse_scaling(arguments)
    with quick_imports():
        from fedra_engine.studies.scale import scale

    scale(scaling)


def parse_scaling(arguments: Sequence[str]) -> Scaling:
    """Read the options of `scale`."""
    options, others = split_options(arguments, _OPTIONS)
    # Answers --help and --print_config, too.
    config = PARSER.parse(others)
    if options.clients is None:
        raise InputError("clients: found none, expected numbers of clients (--clients 10,100,1000)")
    clients, processes, projected = (
        _parse_counts(name, getattr(options, name)) for name in ("clients", "processes", "projected")
    )
    threads = parse_option("threads", options.threads, int, COUNT)
    seconds, latency, bandwidth = (
        parse_option(name, getattr(options, name), float, _POSITIVE) for name in ("seconds", "latency", "bandwidth")
    )
    pairs = [(number, of) for of in processes for number in clients]
    asked = [
        replace(
            config,
            name=f"{number}-clients-{of}-processes",
            data=replace(config.data, partition="bootstrap", clients=number),
            clients=replace(config.clients, sampling="uniform", participants=None),
        )
        for number, of in pairs
    ]
    # A point ignores options of other partitions or samplings.
    _, *configs = validate_together([config, *asked])
    points = tuple(Point(of_point, *pair, threads, seconds) for pair, of_point in zip(pairs, configs, strict=True))
    for point in points:
        validate(point.config)
        if point.processes > point.clients:
            raise InputError(
                f"processes: found {point.processes} with clients {point.clients}, expected at most one for each client"
            )
    network = Network(latency, bandwidth * 1e9)
    return Scaling(points, Path(config.output_dir), projected, network, options.oversubscribe == "true")


def _parse_counts(option: str, text: str) -> tuple[int, ...]:
    counts = [parse_option(option, entry, int, COUNT) for entry in text.split(",")]
    check_different(option, counts)
    return tuple(sorted(counts))
