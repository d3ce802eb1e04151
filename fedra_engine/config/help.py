"""Print `--help` and `--help_all`: a command's options with their values and defaults."""

from __future__ import annotations

import inspect
import shutil
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from fedra_engine.config.fields import describe_type, field_types, settings
from fedra_engine.config.options import FOLDER_NAME, LINES, NATURAL, PATH, TEXT, Allowed
from fedra_engine.config.parsing import IMPORT, Parser
from fedra_engine.config.validation import wanted
from fedra_engine.runtime.errors import shown

FIRST = (
    *("rounds", "seed", "evaluate_every", "name", "output_dir", "report_to"),
    *("data.source", "data.root", "data.image_size", "data.partition", "model.path", "model.head_init"),
    *("lora.rank", "lora.target_modules", "method.name", "clients.capacities", "training.lr", "training.batch_size"),
)
"""The fields of an experiment that `--help` lists."""
_BRIEFLY = {
    PATH: "a path",
    FOLDER_NAME: "the name of a folder",
    TEXT: "text",
    LINES: "text",
    NATURAL: "a whole number from 0",
}
"""Values without the limits that nobody meets by accident."""


class Row(NamedTuple):
    """An option in the help; `value` is its default, or a word for its value, and `takes` what it may be."""

    name: str
    value: str
    meaning: str
    takes: str = ""


def print_help(parser: Parser[Any], *, everything: bool) -> None:
    """Print the description and the options of a command: with `everything`, all fields, else those of `FIRST`."""
    rows = list(field_rows(parser))
    first = [row for row in rows if row.name in FIRST]
    listed = rows if everything or not first else first
    width = min(120, shutil.get_terminal_size().columns)
    print(parser.description.strip())
    heading = (
        "Fields that replace the run's:" if parser.replaces_run else "Fields of the configuration, and their defaults:"
    )
    for title, part in (("Options:", own_rows(parser)), (heading, listed)):
        if part:
            print(f"\n{title}")
        for row in part:
            print(f"  --{row.name} {row.value}".rstrip())
            text = f"{row.meaning} ({row.takes})" if row.takes else row.meaning
            print(textwrap.fill(text.strip(), width, initial_indent=" " * 8, subsequent_indent=" " * 8))
    if listed is not rows:
        print(f"\nThese are the most common fields; --help_all lists all {len(rows)}.")


def own_rows(parser: Parser[Any]) -> list[Row]:
    """The options that are not fields of the configuration."""
    own = (*parser.options, IMPORT) if parser.options else ()
    of_files = [
        Row(
            "config",
            "FILE",
            "YAML file with fields, or the name of one that is shipped; what comes later wins, options too",
        ),
        Row(
            "print_config",
            "",
            "Print the configuration that all arguments give (=skip_default: what differs from the defaults), and exit",
        ),
    ]
    return [
        *(Row(of.name, of.metavar, of.help, f"default: {of.default}" if of.default else "") for of in own),
        *(of_files if parser.reads_files else []),
        Row("help", "", "Print this, and exit"),
        *([Row("help_all", "", "The same with all fields")] if field_types(parser.config_class) else []),
    ]


def field_rows(parser: Parser[Any]) -> Iterator[Row]:
    """The fields of the configuration that the command takes, in their order, with the defaults they have there."""
    for setting in settings(parser.config_class(**parser.defaults)):
        if parser.refusal(setting.name) is not None:
            continue
        needs = (f"only with {wanted(need)}" for need in setting.needs)
        allowed = setting.allowed
        if isinstance(allowed, Allowed):
            allowed = replace(allowed, description=_BRIEFLY.get(allowed, allowed.description))
        takes = "; ".join([describe_type(setting.kind, allowed), *needs])
        meaning = _meanings(type(setting.owner)).get(setting.field, "")
        value = "VALUE" if parser.replaces_run else _as_typed(setting.value)
        yield Row(setting.name, value, meaning.removesuffix("."), takes)


def _as_typed(value: Any) -> str:
    """A value as it is typed on the command line."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_as_typed, value))}]"
    return value if isinstance(value, str) else shown(value)


def _meanings(config_class: type[Any]) -> dict[str, str]:
    """Descriptions of a dataclass's fields, from its docstring's `Args:`."""
    meanings = dict[str, str]()
    name = ""
    for line in inspect.cleandoc(config_class.__doc__ or "").partition("Args:\n")[2].splitlines():
        if line.startswith(" " * 5):
            meanings[name] += f" {line.strip()}"
        else:
            name, _, meanings[name] = line.strip().partition(": ")
    return meanings
