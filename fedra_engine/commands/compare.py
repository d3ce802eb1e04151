"""`compare`: read which methods to run with which seeds."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from fedra_engine.config import ExperimentConfig
from fedra_engine.config.fields import field_names, known_name
from fedra_engine.config.options import COUNT, NATURAL
from fedra_engine.config.parsing import (
    OVERSUBSCRIBE,
    CommandOption,
    Parser,
    check_different,
    check_not_given,
    parse_option,
    quiet_libraries,
    split_options,
)
from fedra_engine.config.validation import validate_setting, validate_together, without_effect
from fedra_engine.runtime.errors import InputError
from fedra_engine.studies.plan import Comparison, PlannedRun

DESCRIPTION = """Run every method with every seed, and compare them.

An entry of --methods is a method, or a variant of it with fields of its own:
<method>:<field>=<value>:<field>=<value>, as in fedra,fedra:method.allocation=covered:training.lr=0.01.
Each run is an ordinary run folder <output_dir>/<method>-seed<seed>. What is finished is not run again, what was
interrupted goes on. The tables, in <output_dir> too, are those of the latest command.
"""
_OPTIONS = (
    CommandOption("methods", "ENTRY,…", "Methods or variants of them"),
    CommandOption("seeds", "SEED,…", "Seeds", default="0"),
    CommandOption("jobs", "N", "Runs at a time, one thread each; a single one has what it needs", default="1"),
    OVERSUBSCRIBE,
)
_PLANNED = {"seed": "--seeds", "name": "--methods", "method.name": "--methods"}
"""Fields that differ from run to run, and the option that sets them."""
_OF_ALL = ("output_dir", "methods", "seeds", "jobs", "oversubscribe", "print_config")
"""Options of the whole comparison."""
_LONGEST_FOLDER = 200
"""Bytes; file systems allow 255, including a seed and a lock's suffix."""


class Variant(NamedTuple):
    """An entry of `--methods`: a method and its own values of some fields."""

    method: str
    overrides: Mapping[str, str]

    @property
    def label(self) -> str:
        """Name in tables: `fedra allocation=covered`."""
        fields = (f"{field.removeprefix('method.')}={value}" for field, value in self.overrides.items())
        return " ".join([self.method, *fields])

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
    # The bars of many models would come between the lines of a terminal.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    quiet_libraries()
    from fedra_engine.studies.compare import compare

    compare(comparison)


def parse_comparison(arguments: Sequence[str]) -> Comparison:
    """Read the options of `compare`."""
    options, others = split_options(arguments, _OPTIONS)
    check_not_given(others, _PLANNED)
    parser = Parser(ExperimentConfig, DESCRIPTION, _OPTIONS, {"output_dir": "runs/compare"})
    # Answers --help and --print_config, too.
    base = parser.parse(others)
    if options.methods is None:
        raise InputError("methods: found none, expected methods separated by commas (--methods fedra,alllarge)")
    variants = [_parse_variant(entry) for entry in _split(options.methods, ",")]
    seeds = [parse_option("seeds", seed, int, NATURAL) for seed in options.seeds.split(",")]
    check_different("methods", [variant.folder for variant in variants])
    check_different("seeds", seeds)
    configs = []
    for variant in variants:
        fields = {"method.name": variant.method, **variant.overrides}
        config = parser.parse([*others, *(f"--{field}={value}" for field, value in fields.items())])
        configs.append(config)
        for field, why in without_effect(config).items():
            if field in variant.overrides:
                raise InputError(f"methods: {why}")
    # An option that is given for all may be one of a single method.
    configs = validate_together(configs)
    runs = tuple(
        PlannedRun(replace(config, seed=seed, name=f"{variant.folder}-seed{seed}"), variant.label)
        for seed in seeds
        for variant, config in zip(variants, configs, strict=True)
    )
    for run in runs:
        validate_setting(run.config)
    jobs = parse_option("jobs", options.jobs, int, COUNT)
    return Comparison(runs, Path(base.output_dir), jobs, options.oversubscribe == "true")


def _parse_variant(entry: str) -> Variant:
    """Parse an entry such as `fedra:method.allocation=covered`."""
    method, *assignments = _split(entry, ":")
    overrides, names = dict[str, str](), list(field_names(ExperimentConfig))
    for assignment in assignments:
        field, equals, value = assignment.partition("=")
        if not field or not equals:
            raise InputError(f"methods: found {assignment!r} in {entry!r}, expected <field>=<value>")
        if field in (*_PLANNED, *_OF_ALL):
            raise InputError(f"methods: found {field} in {entry!r}, expected another field of the experiment")
        if field not in names:
            raise InputError(
                f"methods: found an unknown field {field!r} in {entry!r}, expected {known_name(field, names)}"
            )
        if field in overrides:
            raise InputError(f"methods: found {field} more than once in {entry!r}, expected every field once")
        overrides[field] = value
    if not method:
        raise InputError(f"methods: found an entry {entry!r}, expected the name of a method first")
    variant = Variant(method, overrides)
    if len(variant.folder.encode()) > _LONGEST_FOLDER:
        raise InputError(
            f"methods: found {entry!r}, expected fewer fields (folders are named after them; --config can have the "
            "others, with an output_dir of its own)"
        )
    return variant


def _split(text: str, separator: str) -> list[str]:
    """Split `text` at separators outside of brackets, as lists have commas, too."""
    return [part.strip() for part in re.split(rf"{separator}(?![^\[]*\])", text)]
