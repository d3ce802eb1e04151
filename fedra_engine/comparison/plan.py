"""What the command line of `compare` asks for: which methods with which seeds, as one run folder each.

Nothing here imports torch, so that `--help` and a mistyped option answer at once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedra_engine.commands.names import known_name
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
from fedra_engine.config.fields import field_names
from fedra_engine.config.options import COUNT, NATURAL
from fedra_engine.config.validation import validate_setting, validate_together, without_effect
from fedra_engine.runtime.errors import InputError

DESCRIPTION = """Run every method with every seed, and compare them.

An entry of --methods is a method, or a variant of it with fields of its own:
<method>:<field>=<value>:<field>=<value>, as in fedra,fedra:method.allocation=covered:training.lr=0.01.
Each run is an ordinary run folder <output_dir>/<method>-seed<seed>. What is finished is not run again, what was
interrupted goes on. The tables, in <output_dir> too, are those of the latest command.
"""
_OUTPUT_DIR = "runs/compare"
_OPTIONS = (
    LauncherOption("methods", "ENTRY,…", "Methods or variants of them"),
    LauncherOption("seeds", "SEED,…", "Seeds", default="0"),
    LauncherOption("jobs", "N", "Runs at a time, one thread each; a single one has what it needs", default="1"),
    OVERSUBSCRIBE,
)
_PLANNED = {"seed": "--seeds", "name": "--methods", "method.name": "--methods"}
"""Fields that differ from run to run, and the option that sets them."""
_OF_ALL = ("output_dir", "methods", "seeds", "jobs", "oversubscribe", "print_config")
"""Options that no run has for itself."""
_LONGEST_FOLDER = 200
"""Bytes; file systems take 255, and a seed and a lock's suffix are still to come."""


@dataclass(frozen=True)
class Variant:
    """An entry of `--methods`: a method, and the fields by which it differs from the others' setting."""

    method: str
    overrides: tuple[tuple[str, str], ...] = ()

    @property
    def label(self) -> str:
        """How tables call it: `fedra allocation=covered`."""
        fields = (f"{field.removeprefix('method.')}={value}" for field, value in self.overrides)
        return " ".join([self.method, *fields])

    @property
    def folder(self) -> str:
        """The same as part of a folder's name: `fedra-allocation=covered`."""
        return re.sub(r"[^\w.=+-]+", "-", re.sub(r"[\[\]\"']", "", self.label))

    @property
    def options(self) -> list[str]:
        """The same as options of an experiment."""
        return [f"--method.name={self.method}", *(f"--{field}={value}" for field, value in self.overrides)]


@dataclass(frozen=True)
class PlannedRun:
    """A run that the comparison needs.

    Attributes:
        label: its method's, as tables have it.
        config: everything else; the name is the folder's.
    """

    label: str
    config: ExperimentConfig

    @property
    def title(self) -> str:
        """How messages call it."""
        return f"{self.label} seed {self.config.seed}"

    @property
    def path(self) -> Path:
        """Its run folder."""
        assert self.config.name is not None
        return Path(self.config.output_dir) / self.config.name

    @property
    def lock_file(self) -> Path:
        """Held by the process that is executing the run. Beside the run folder, which may be made and removed."""
        return self.path.with_name(f".{self.path.name}.lock")


@dataclass(frozen=True)
class Comparison:
    """The runs, the first seed of every method first; the folder of their folders; and how many run at a time.

    With `oversubscribe`, these may be more than the cores.
    """

    runs: tuple[PlannedRun, ...]
    output_dir: Path
    jobs: int
    oversubscribe: bool


def parse_comparison(arguments: Sequence[str]) -> Comparison:
    """Read the options of `compare`: those of an experiment, `--methods`, `--seeds` and `--jobs`.

    Raises:
        InputError: the options cannot be used.
    """
    options, others = split_options(arguments, _OPTIONS)
    parser = Parser(ExperimentConfig, DESCRIPTION, _OPTIONS, {"output_dir": _OUTPUT_DIR})
    # Answers --help and --print_config, too.
    base = parser.parse(others)
    check_not_given(others, _PLANNED)
    if options.methods is None:
        raise InputError("methods: found none, expected methods separated by commas (--methods fedra,alllarge)")
    variants = [_parse_variant(entry) for entry in _split(options.methods, ",")]
    seeds = [parse_option("seeds", seed, int, NATURAL) for seed in options.seeds.split(",")]
    check_different("methods", [variant.folder for variant in variants])
    check_different("seeds", seeds)
    configs = [parser.parse([*others, *variant.options]) for variant in variants]
    for variant, config in zip(variants, configs, strict=True):
        idle = without_effect(config)
        for field in (field for field, _ in variant.overrides if field in idle):
            raise InputError(f"methods: {idle[field]}")
    # What is given for all may be an option of one method alone.
    configs = validate_together(configs)
    runs = tuple(
        PlannedRun(variant.label, replace(config, seed=seed, name=f"{variant.folder}-seed{seed}"))
        for seed in seeds
        for variant, config in zip(variants, configs, strict=True)
    )
    for run in runs:
        validate_setting(run.config)
    jobs = parse_option("jobs", options.jobs, int, COUNT)
    return Comparison(runs, Path(base.output_dir), jobs, options.oversubscribe == "true")


def _parse_variant(entry: str) -> Variant:
    """`fedra:method.allocation=covered` as a variant."""
    method, *assignments = _split(entry, ":")
    overrides: list[tuple[str, str]] = []
    for assignment in assignments:
        field, equals, value = assignment.partition("=")
        if not field or not equals:
            raise InputError(f"methods: found {assignment!r} in {entry!r}, expected <field>=<value>")
        if field in (*_PLANNED, *_OF_ALL):
            raise InputError(f"methods: found {field} in {entry!r}, expected another field of the experiment")
        if field not in (names := list(field_names(ExperimentConfig))):
            raise InputError(
                f"methods: found an unknown field {field!r} in {entry!r}, expected {known_name(field, names)}"
            )
        if field in dict(overrides):
            raise InputError(f"methods: found {field} more than once in {entry!r}, expected every field once")
        overrides.append((field, value))
    if not method:
        raise InputError(f"methods: found an entry {entry!r}, expected the name of a method first")
    variant = Variant(method, tuple(overrides))
    if len(variant.folder.encode()) > _LONGEST_FOLDER:
        raise InputError(
            f"methods: found {entry!r}, expected fewer fields (folders are named after them; --config can have the "
            "others, with an output_dir of its own)"
        )
    return variant


def _split(text: str, separator: str) -> list[str]:
    """`text` between separators outside of brackets: lists have commas, too."""
    return [part.strip() for part in re.split(rf"{separator}(?![^\[]*\])", text)]
