"""Parse the arguments of a command into a configuration; whatever cannot be used is an InputError.

Every field of a configuration is an option, with dots between levels: `--training.lr 0.01`. So is a group of fields:
`--training FILE` or `--training '{lr: 0.01}'`.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, is_dataclass
from functools import reduce
from pathlib import Path
from typing import Any, Generic, TypeVar, get_origin

import yaml

import fedra_engine
from fedra_engine.config import ExperimentConfig
from fedra_engine.config.fields import (
    ALIASES,
    did_you_mean,
    field_names,
    field_types,
    known_name,
    type_of_field,
    union_members,
)
from fedra_engine.config.options import Allowed
from fedra_engine.config.validation import check_values
from fedra_engine.config.values import dump_yaml, fitted, load_yaml, load_yaml_file, read_text
from fedra_engine.runtime.errors import InputError, one_line, shown

Config = TypeVar("Config")
_WITHOUT_VALUE = ("help", "help_all", "print_config")
_IMPORTED = "FEDRA_IMPORT"
"""Environment variable that passes `--import` on to the processes that a command starts."""


@dataclass(frozen=True)
class CommandOption:
    """An option that a command has beside the fields of the experiment.

    Attributes:
        name: without dashes.
        metavar: name of the value in the help.
        help: a sentence without its full stop.
        default: value, as text, if the option is not given.
        choices: all values; any if empty. Without a value, an option that can be true is true.
    """

    name: str
    metavar: str = "VALUE"
    help: str = ""
    default: str | None = None
    choices: tuple[str, ...] = ()


def switch(name: str, help: str, default: str = "false") -> CommandOption:
    """An option that is true or false; the arguments are attributes of `CommandOption`."""
    return CommandOption(name, "[true|false]", help, default, ("true", "false"))


OVERSUBSCRIBE = switch("oversubscribe", "Whether processes may share cores")
QUIET = switch("quiet", "Print nothing but the results and, on stderr, errors")
LOG_LEVEL = CommandOption(
    "log_level",
    "LEVEL",
    "The least severe messages that are printed and kept in run.log: debug (how long everything takes), info (rounds, "
    "accuracies), warning or error",
    "info",
    ("debug", "info", "warning", "error"),
)
IMPORT = CommandOption(
    "import", "MODULE", "A module of yours that registers methods, sources and so on; may be given several times"
)


@dataclass
class NoFields:
    """The fields of a command that takes none of an experiment."""


@dataclass
class Parser(Generic[Config]):
    """Reads the fields of a dataclass from arguments.

    Attributes:
        description: what the command does, for the help.
        options: the command's other options, which it takes from the arguments with `split_options`.
        defaults: of fields, where the command's differ from those of `config_class`.
        reads_files: whether the help lists --config and --print_config.
        refused: fields and groups that the command refuses as options and leaves out of its help, and what a message
            says is expected in place of each.
        replaces_run: whether the fields replace those of a run, so that the defaults of `config_class` do not hold.
    """

    config_class: type[Config]
    description: str = ""
    options: Sequence[CommandOption] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    reads_files: bool = True
    refused: Mapping[str, str] = field(default_factory=dict)
    replaces_run: bool = False

    def parse(self, arguments: Sequence[str]) -> Config:
        """The configuration that `arguments` describe; prints and exits on `--help` and `--print_config`."""
        given = list(_options(arguments))
        if asked := {option.name for option in given} & {"help", "help_all"}:
            from fedra_engine.config.help import print_help

            print_help(self, everything="help_all" in asked)
            sys.exit(0)
        values = dict(self.defaults)
        for option in given:
            name = option.name.removesuffix("+")
            if (expected := self.refusal(name)) is not None:
                raise InputError(f"{name}: found it as an option, expected {expected}")
            if option.name == "config":
                _merge(values, self._read_file(option.needed))
            elif option.name != "print_config":
                _merge(values, self._read_option(option, values))
        config: Config = fitted("", self.config_class, values)
        check_values(config)
        for option in given:
            if option.name == "print_config":
                self._print(config, option.value)
                sys.exit(0)
        return config

    def refusal(self, name: str) -> str | None:
        """What a message says is expected in place of the field `name`; None if the command takes the field."""
        return next((text for of, text in self.refused.items() if f"{name}.".startswith(f"{of}.")), None)

    def _print(self, config: Any, what: str | None) -> None:
        """Print a configuration as YAML; if `what` is `skip_default`, only what differs from the defaults."""
        if what not in (None, "", "skip_default", "skip-default"):
            raise InputError(f"print_config: found {what!r}, expected skip_default or nothing")
        values, usual = asdict(config), asdict(self.config_class())  # type: ignore[call-overload]
        print(dump_yaml(_others(values, usual) if what else values), end="")

    def _read_file(self, name: str) -> dict[str, Any]:
        """The fields and values of a file, or of a shipped configuration."""
        values = load_yaml_file("config", _shipped(name))
        for other in ("config", *(option.name for option in self.options)):
            if other in values.keys() - field_types(self.config_class).keys():
                raise InputError(f"{other}: found it in a file, {name!r}, expected it as an option, --{other}")
        self._check_names("", self.config_class, values, f" in {name}")
        return values

    def _read_option(self, option: _Given, before: Mapping[str, Any]) -> dict[str, Any]:
        """The fields and values that an option sets; with + after its name, it appends to the list in `before`."""
        name, appends = option.name.removesuffix("+"), option.name.endswith("+")
        kind = type_of_field(name, self.config_class)
        lists = [member for member in union_members(kind) if get_origin(member) is list]
        if kind is None or (appends and not lists):
            own, typed = [f"--{option.name}" for option in self.options], f"--{option.typed.lstrip('-')}"
            known = known_name(typed, [*field_names(self.config_class), "config", *_WITHOUT_VALUE])
            if near := did_you_mean(typed, own, cutoff=0.8):
                known = f"one that --help_all lists{near}"
            what = "an unknown option" if option.typed.startswith("-") else "an argument without an option"
            raise InputError(f"{option.typed}: found {what}, expected {known}")
        if is_dataclass(kind):
            value: Any = self._read_group(name, kind, option.needed)
        elif option.value is None and bool in union_members(kind):
            value = True
        elif appends:
            present = reduce(getattr, name.split("."), fitted("", self.config_class, before))
            if not isinstance(present, list):
                raise InputError(f"{name}: found {shown(present)} to append to, expected a list")
            text = option.needed
            more = read_text(name, lists[0], f"[{text}]" if text.startswith("{") else text)
            value = [*present, *(more if isinstance(more, list) else [more])]
        else:
            value = read_text(name, kind, option.needed)
        return reduce(lambda inner, part: {part: inner}, reversed(name.split(".")), value)

    def _read_group(self, name: str, kind: Any, text: str) -> Any:
        """The fields and values of a group, from YAML in braces or a file."""
        values: Any = text
        if text.startswith("{"):
            with suppress(yaml.YAMLError):
                values = load_yaml(text)
            self._check_names(name, kind, values, "")
            return values
        try:
            values = load_yaml_file(name, text)
            self._check_names(name, kind, values, f" in {text}")
        except InputError as error:
            if name in ALIASES and not os.path.exists(text):
                own = any(option.name == f"{name}s" for option in self.options)
                raise InputError(f"{error} (did you mean --{f'{name}s' if own else ALIASES[name]}?)") from error
            raise
        return values

    def _check_names(self, name: str, kind: Any, values: Any, where: str) -> None:
        """Check that the `values` of a group are fields of it; `where` names their file in messages."""
        kinds = field_types(kind)
        if not isinstance(values, dict):
            raise InputError(f"{name}: found {shown(values)}, expected fields of it: {', '.join(kinds)}")
        for key, value in values.items():
            of_field = f"{name}.{key}".removeprefix(".")
            if key not in kinds:
                known = known_name(of_field, field_names(self.config_class))
                raise InputError(f"{of_field}: found an unknown field{where}, expected {known}")
            if is_dataclass(kinds[key]):
                self._check_names(of_field, kinds[key], value, where)


def read_config(file: Path, *options: str) -> ExperimentConfig:
    """Read the experiment in a file, with `options` in place of its values; InputError if it cannot be read."""
    import_modules()
    return Parser(ExperimentConfig).parse(["--config", str(file), *options])


def split_options(arguments: Sequence[str], options: Sequence[CommandOption]) -> tuple[Namespace, list[str]]:
    """Split arguments into the values of a command's own `options`, as text, and the others; handles `--import`."""
    known, values, others = {option.name: option for option in options}, Namespace(), list[str]()
    for option in options:
        setattr(values, option.name, option.default)
    for given in _options(arguments):
        if given.name not in (*known, "import"):
            others += given.arguments
        elif given.name == "import":
            import_modules(given.needed)
        else:
            option = known[given.name]
            value = "true" if given.value is None and "true" in option.choices else given.needed
            value = {"yes": "true", "no": "false"}.get(value, value) if "true" in option.choices else value
            if option.choices and value not in option.choices:
                raise InputError(f"{option.name}: found {value!r}, expected {' or '.join(option.choices)}")
            setattr(values, option.name, value)
    return values, others


def import_modules(*names: str) -> None:
    """Import modules by name, and those imported by the command that started this process."""
    wanted = dict.fromkeys([*imported_modules(), *names])
    if wanted and os.getcwd() not in sys.path:
        # The path of an installed command lacks the working directory.
        sys.path.insert(0, os.getcwd())
    for name in wanted:
        try:
            importlib.import_module(name)
        except (ImportError, SyntaxError, TypeError, ValueError) as error:
            raise InputError(f"import: found {name!r} ({one_line(error)}), expected a module of yours") from error
    os.environ[_IMPORTED] = " ".join(wanted)


def imported_modules() -> list[str]:
    """Names of the modules that `--import` has imported, here or in the process that started this one."""
    return os.environ.get(_IMPORTED, "").split()


def split_positional(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split arguments into those that belong to no option and the others."""
    given = list(_options(arguments))
    free, named = ([o for o in given if bool(o.name) == has_name] for has_name in (False, True))
    return [o.arguments[0] for o in free], [argument for o in named for argument in o.arguments]


def given_options(arguments: Sequence[str]) -> list[str]:
    """Names of the options among the arguments, without leading dashes and with _ between words."""
    return [option.name.removesuffix("+") for option in _options(arguments)]


def asks_for_help(arguments: Sequence[str]) -> bool:
    """Whether `--help`, `-h` or `--help_all` is among the arguments."""
    return not {"help", "help_all"}.isdisjoint(given_options(arguments))


def parse_option(option: str, text: str, kind: type[int] | type[float], allowed: Allowed) -> Any:
    """The number in the `text` of an `option`; InputError if it is none, or not allowed."""
    # Thousands of digits take long to parse. Python also accepts `1_000` and digits of other scripts.
    if len(text) < 30 and text.isascii() and "_" not in text:
        with suppress(ValueError):
            value = kind(text)
            if allowed.contains(value):
                return value
    raise InputError(f"{option}: found {shown(text)}, expected {allowed.description}")


def check_different(option: str, entries: Sequence[str | int]) -> None:
    """Raise InputError if an `option` has one of its `entries` twice."""
    entry, times = Counter(entries).most_common(1)[0]
    if times > 1:
        raise InputError(f"{option}: found {entry} more than once, expected every one once")


def quiet_libraries(*, bars: bool = True) -> None:
    """Silence Hugging Face libraries, imported later, but for errors and, with `bars`, progress in a terminal."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not bars or not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0":
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


@dataclass(frozen=True)
class _Given:
    """An option as it was `typed`, its name and value, and the arguments that it consists of."""

    typed: str
    name: str
    value: str | None
    arguments: Sequence[str]

    @property
    def needed(self) -> str:
        """The option's value; InputError if it has none."""
        if self.value is None:
            raise InputError(f"{self.name}: found no value, expected one")
        return self.value


def _options(arguments: Sequence[str]) -> Iterator[_Given]:
    """The arguments, one by one: `--name value`, `--name=value` or `--name`, with - or _ between words.

    An argument that is not an option has an empty name.
    """
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        typed, equals, value = argument.partition("=")
        is_option = typed.startswith("--") and not typed.startswith("---")
        name = typed[2:].replace("-", "_") if is_option else "help" if typed == "-h" else ""
        if equals:
            yield _Given(typed, name, value, [argument])
        elif is_option and name not in _WITHOUT_VALUE and rest and not rest[0].startswith("--"):
            value = rest.pop(0)
            yield _Given(typed, name, value, [argument, value])
        else:
            yield _Given(typed, name, None, [argument])


def _shipped(name: str) -> str:
    """The file of the shipped configuration `name`, unless `name` is a file itself."""
    if os.path.exists(name) or not re.fullmatch(r"[\w-]{1,100}", name):
        return name
    files = {file.stem: str(file) for file in Path(fedra_engine.__file__).parent.glob("configs/experiments/*.yaml")}
    if name not in files:
        near = did_you_mean(name, list(files))
        raise InputError(f"config: found no file {name!r}, expected one, or one of {', '.join(sorted(files))}{near}")
    return files[name]


def _merge(values: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Update `values`, group by group."""
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            _merge(values[key], value)
        else:
            values[key] = value


def _others(values: Mapping[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
    """The `values` that differ from the `usual` ones, group by group; mappings, which are usually empty, as a whole."""
    return {
        name: _others(value, usual[name]) if isinstance(value, dict) and usual[name] else value
        for name, value in values.items()
        if value != usual[name]
    }
