"""`compare`: read which methods to run with which seeds."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from itertools import product
from pathlib import Path
from typing import NamedTuple

from fedra_engine.config import ExperimentConfig
from fedra_engine.config.fields import field_names, known_name
from fedra_engine.config.options import COUNT, NATURAL
from fedra_engine.config.parsing import (
    OVERSUBSCRIBE,
    QUIET,
    CommandOption,
    Parser,
    check_different,
    parse_option,
    quiet_libraries,
    split_options,
    switch,
)
from fedra_engine.config.validation import (
    check_paths,
    check_trackers,
    validate_setting,
    validate_together,
    without_effect,
)
from fedra_engine.runtime.errors import InputError
from fedra_engine.runtime.quick_imports import quick_imports
from fedra_engine.studies.plan import Candidate, Comparison, PlannedRun

DESCRIPTION = """Run every method with every seed, and compare them.

An entry of --methods is a method, or a variant of it with fields of its own:
<method>:<field>=<value>:<field>=<value>, as in fedra,fedra:method.allocation=covered:training.lr=0.01.
Each run is an ordinary run folder <output_dir>/<method>-seed<seed>. What is finished is not run again, what was
interrupted is resumed. The tables, in <output_dir> too, are those of the latest command.

--grid training.lr=0.003,0.01:training.lr_schedule=constant,cosine tries all combinations of these values with the first
seed, for each entry that does not have the field itself, in <output_dir>/grid. They are measured on validation samples
(data.validation_fraction, or 0.2); the best of each entry is then run with every seed and measured on the test samples,
which are the same for all seeds (data.split_seed, or the first seed).
"""
_OPTIONS = (
    CommandOption("methods", "ENTRY,…", "Methods or variants of them"),
    CommandOption("seeds", "SEED,…", "Seeds", default="0"),
    CommandOption(
        "grid", "FIELD=VALUE,…", "Values to choose from on validation samples; several fields have : between"
    ),
    switch(
        "control",
        "Whether to add the full-depth control, alllarge with method.ignore_capacities, where there is no alllarge",
        default="true",
    ),
    CommandOption("jobs", "N", "Runs at a time, one thread each; a single one has what it needs", default="1"),
    OVERSUBSCRIBE,
    QUIET,
)
_PLANNED = {"seed": "--seeds to set it", "name": "--methods to set it", "method.name": "--methods to set it"}
"""Fields that differ from run to run, and what is expected in their place."""
_OF_ALL = (
    *("output_dir", "methods", "seeds", "grid", "control", "jobs", "oversubscribe", "quiet", "print_config"),
    "data.validation_fraction",
)
"""Options of the whole comparison."""
PARSER = Parser(ExperimentConfig, DESCRIPTION, _OPTIONS, {"output_dir": "runs/compare"}, refused=_PLANNED)
_VALIDATION_FRACTION = 0.2
"""Of a grid's runs, if the configuration has none."""
_LONGEST_FOLDER = 200
"""Bytes; file systems allow 255, including a seed and a lock's suffix."""

Read = Callable[[Mapping[str, str]], ExperimentConfig]
"""Gives the experiment of the command's other options with the values of these fields."""
Point = Mapping[str, str]
"""Values of some fields of the grid."""


class Variant(NamedTuple):
    """An entry of `--methods`: a method and its own values of some fields."""

    method: str
    overrides: Mapping[str, str]

    def at(self, point: Point) -> Variant:
        """With the values of a `point` of the grid, too."""
        variant = Variant(self.method, {**self.overrides, **point})
        if len(variant.folder.encode()) > _LONGEST_FOLDER:
            raise InputError(
                f"methods: found {variant.label!r}, expected fewer fields (folders are named after them; --config can "
                "have the others, with an output_dir of its own)"
            )
        return variant

    @property
    def fields(self) -> dict[str, str]:
        """Its method and overrides, by field."""
        return {"method.name": self.method, **self.overrides}

    @property
    def label(self) -> str:
        """Name in tables: `fedra allocation=covered`."""
        return f"{self.method} {_shown(self.overrides)}".rstrip()

    @property
    def folder(self) -> str:
        """Name in file names: `fedra-allocation=covered`."""
        return re.sub(r"[^\w.=+-]+", "-", re.sub(r"[\[\]\"']", "", self.label))


def main(arguments: Sequence[str]) -> None:
    """Execute the runs that `arguments` ask for and that are not finished, and report on all of them."""
    comparison = parse_comparison(arguments)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            "processes: found several started by a launcher, expected one (--jobs runs several experiments at a time)"
        )
    for run in comparison.runs:
        check_paths(run.config)
        check_trackers(run.config.report_to)
    # The bars of many models would come between the lines of a terminal.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    quiet_libraries()
    with quick_imports():
        from fedra_engine.studies.compare import compare

    compare(comparison)


def parse_comparison(arguments: Sequence[str]) -> Comparison:
    """Read the options of `compare`."""
    options, others = split_options(arguments, _OPTIONS)

    def read(fields: Mapping[str, str]) -> ExperimentConfig:
        options = (f"--{field}={value}" for field, value in fields.items())
        return replace(PARSER, refused={}).parse([*others, *options])

    # Answers --help and --print_config, too, and refuses what differs from run to run.
    base = PARSER.parse(others)
    if options.methods is None:
        raise InputError("methods: found none, expected methods separated by commas (--methods fedra,alllarge)")
    variants = [_parse_variant(entry) for entry in _split(options.methods, ",")]
    grid = {} if options.grid is None else _parse_grid(options.grid, read)
    if options.control == "true" and all(variant.method != "alllarge" for variant in variants):
        variants.append(_control(base, grid))
    seeds = [parse_option("seeds", seed, int, NATURAL) for seed in options.seeds.split(",")]
    check_different("methods", [variant.folder for variant in variants])
    check_different("seeds", seeds)
    jobs = parse_option("jobs", options.jobs, int, COUNT)
    entries = _candidates(variants, grid, seeds, read)
    check_different("grid", [str(one.runs[0].path) for candidates in entries for one in candidates])
    return Comparison(entries, Path(base.output_dir), jobs, options.oversubscribe == "true", options.quiet == "true")


def _control(base: ExperimentConfig, grid: Collection[str]) -> Variant:
    """AllLarge with all clients at full depth and rank, without what other methods may need and this one refuses."""
    fields = {"method.ignore_capacities": "true"}
    if base.method.allocation is not None or "method.allocation" in grid:
        fields["method.allocation"] = "null"
    if base.clients.ranks or "clients.ranks" in grid:
        fields["clients.ranks"] = "[]"
    return Variant("alllarge", fields)


def _candidates(
    variants: Sequence[Variant], grid: Mapping[str, Sequence[str]], seeds: Sequence[int], read: Read
) -> tuple[tuple[Candidate, ...], ...]:
    """Each entry's points of the grid, without those that would train the same as an earlier one."""
    points, configs = list[tuple[Variant, Point]](), list[ExperimentConfig]()
    for variant in variants:
        own = _points(variant, grid, read)
        at_points = [read(variant.at(point).fields) for point in own]
        if grid:
            _refuse_chosen_rounds(at_points)
        idle = [without_effect(config) for config in at_points]
        for field in variant.overrides:
            if all(field in messages for messages in idle):
                raise InputError(f"methods: {idle[0][field]}")
        points += [(variant, point) for point in own]
        configs += at_points
    for field in grid:
        if all(field in variant.overrides for variant in variants):
            raise InputError(f"grid: found {field}, which all entries of --methods have, expected another field")
        if not any(field in point for _, point in points):
            raise InputError(f"grid: found {field}, which does nothing with any entry of --methods, expected another")
    # An option that is given for all may be one of a single method.
    entries: dict[str, list[tuple[Variant, Point, ExperimentConfig]]] = {}
    for (variant, point), config in zip(points, validate_together(configs), strict=True):
        entry = entries.setdefault(variant.folder, [])
        if all(config != other for *_, other in entry):
            entry.append((variant, point, config))
    return tuple(
        tuple(_candidate(*each, grid, seeds, alone=len(entry) == 1) for each in entry) for entry in entries.values()
    )


def _refuse_chosen_rounds(configs: Sequence[ExperimentConfig]) -> None:
    """Raise InputError if a round would be chosen on the test samples, which the runs after a grid are measured on."""
    for config in configs:
        for name, value in config.chosen_rounds().items():
            raise InputError(
                f"{name}: found {value} with --grid, whose final runs are measured on test samples, expected none"
            )


def _points(variant: Variant, grid: Mapping[str, Sequence[str]], read: Read) -> list[Point]:
    """All combinations of the values of fields that `variant` does not have itself and that do something with it."""
    own = {field: values for field, values in grid.items() if field not in variant.overrides}
    points = list[Point]()
    for values in product(*own.values()):
        point = dict(zip(own, values, strict=True))
        # Without one field, another may have no effect either.
        while idle := point.keys() & without_effect(read(variant.at(point).fields)):
            point = {field: value for field, value in point.items() if field not in idle}
        if point not in points:
            points.append(point)
    return points


def _candidate(
    variant: Variant,
    point: Point,
    config: ExperimentConfig,
    grid: Mapping[str, Sequence[str]],
    seeds: Sequence[int],
    *,
    alone: bool,
) -> Candidate:
    """The runs with a `point` of the grid; `alone` if the entry has no other."""
    at, fraction = variant.at(point), config.data.validation_fraction
    runs_config, trial = config, None
    if grid:
        # With another split, test samples of other seeds would be among those that choose.
        split = seeds[0] if config.data.split_seed is None else config.data.split_seed
        data = replace(config.data, split_seed=split, validation_fraction=fraction or _VALIDATION_FRACTION)
        folder, name = str(Path(config.output_dir) / "grid"), f"{at.folder}-seed{seeds[0]}"
        tried = replace(config, seed=seeds[0], name=name, output_dir=folder, data=data)
        validate_setting(tried)
        trial = None if alone else PlannedRun(tried, at.label, is_trial=True)
        runs_config = replace(config, data=replace(data, validation_fraction=0.0))
    runs = tuple(
        PlannedRun(replace(runs_config, seed=seed, name=f"{at.folder}-seed{seed}"), variant.label) for seed in seeds
    )
    for run in runs:
        validate_setting(run.config)
    edges = tuple(field for field, value in point.items() if _is_extreme(value, grid[field]))
    return Candidate(_shown(point), edges, trial, runs)


def _shown(fields: Mapping[str, str]) -> str:
    """For tables: `allocation=covered training.lr=0.01`."""
    return " ".join(f"{field.removeprefix('method.')}={value}" for field, value in fields.items())


def _is_extreme(value: str, values: Sequence[str]) -> bool:
    """Whether `value` is the smallest or largest of several `values` of a field, if these are numbers."""
    try:
        numbers = [float(each) for each in values]
    except ValueError:
        return False
    return len(numbers) > 1 and float(value) in (min(numbers), max(numbers))


def _parse_grid(text: str, read: Read) -> dict[str, list[str]]:
    """Parse `training.lr=0.01,0.1:training.lr_schedule=constant,cosine`: values by field."""
    grid = dict[str, list[str]]()
    for assignment in _split(text, ":"):
        field, values_text = _parse_field("grid", assignment, text, grid)
        values = _split(values_text, ",")
        parsed = [reduce(getattr, field.split("."), read({field: value})) for value in values]
        check_different("grid", [f"{field}={value}" for value in parsed])
        grid[field] = values
    if grid and all(len(values) == 1 for values in grid.values()):
        raise InputError(f"grid: found one point {text!r}, expected several (a field has its own option)")
    return grid


def _parse_field(option: str, assignment: str, where: str, before: Mapping[str, object]) -> tuple[str, str]:
    """The field and the value of an `assignment` in the text `where` of an option."""
    field, equals, value = assignment.partition("=")
    if not field or not equals:
        raise InputError(f"{option}: found {assignment!r} in {where!r}, expected <field>=<value>")
    if field in (*_PLANNED, *_OF_ALL):
        raise InputError(f"{option}: found {field} in {where!r}, expected another field of the experiment")
    if field not in (names := list(field_names(ExperimentConfig))):
        raise InputError(
            f"{option}: found an unknown field {field!r} in {where!r}, expected {known_name(field, names)}"
        )
    if field in before:
        raise InputError(f"{option}: found {field} more than once in {where!r}, expected every field once")
    return field, value


def _parse_variant(entry: str) -> Variant:
    """Parse an entry such as `fedra:method.allocation=covered`."""
    method, *assignments = _split(entry, ":")
    overrides = dict[str, str]()
    for assignment in assignments:
        field, value = _parse_field("methods", assignment, entry, overrides)
        overrides[field] = value
    if not method:
        raise InputError(f"methods: found an entry {entry!r}, expected the name of a method first")
    return Variant(method, overrides)


def _split(text: str, separator: str) -> list[str]:
    """Split `text` at separators outside of brackets, as lists have commas, too."""
    return [part.strip() for part in re.split(rf"{separator}(?![^\[]*\])", text)]
