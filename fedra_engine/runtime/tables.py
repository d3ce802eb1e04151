"""Text on a terminal, in tables and in Markdown, in which names are never taken for markup."""

from __future__ import annotations

import io
import re
from collections.abc import Collection, Sequence
from typing import Any

from rich.console import Console  # noqa: TID251 - the one that all others are made of
from rich.table import Table
from rich.text import Text

from fedra_engine.runtime.errors import printable

Cells = list[list[str]]
"""Rows of a table, the header first."""
_WIDEST = 100_000
"""Columns of a terminal, more than any table needs."""
_MARKDOWN = re.compile(r"[\\`*<>|~&$]|\](?=[(\[:])|(?<![^\W_])_|_(?![^\W_])")
"""Characters that begin or end markup; `_` between letters or digits does not."""


class PlainConsole(Console):
    """A console of rich without markup, emoji and highlighting, which escapes control characters.

    It prints text in a notebook, too, where rich would show HTML whatever `file` and `quiet` are.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, force_jupyter=False, **options)
        self._is_forced = bool(options.get("force_terminal"))

    @property
    def can_redraw(self) -> bool:
        """Whether lines can be replaced after they were printed: in a terminal, not in a file with FORCE_COLOR."""
        return not self.quiet and self.is_interactive and (self._is_forced or self.file.isatty())

    def render_str(self, text: str, **options: Any) -> Text:
        """Render a string, also one in a table, with control characters escaped."""
        return super().render_str(printable(text, keep="\n"), **options)


def number_text(value: float) -> str:
    """`value` with three significant digits, and all digits before the decimal point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def bytes_text(value: float) -> str:
    """A number of bytes, as in `1.5 MiB`."""
    return _scaled(value, 1024, (" B", " KiB", " MiB", " GiB", " TiB"))


def flops_text(value: float) -> str:
    """A number of FLOPs, as in `1.5 G`."""
    return _scaled(value, 1000, ("", " k", " M", " G", " T", " P"))


def duration_text(seconds: float) -> str:
    """A duration with two digits or three, in seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def rich_table(rows: Cells, left: Collection[int] = (0,)) -> Table:
    """The table for rich, with columns aligned right except those in `left`."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for index, name in enumerate(rows[0]):
        table.add_column(printable(name), justify="left" if index in left else "right", no_wrap=True)
    for row in rows[1:]:
        table.add_row(*map(printable, row))
    return table


def table_text(table: Table, width: int = _WIDEST) -> str:
    """The table as lines of up to `width` columns, whatever the width of the terminal."""
    text = io.StringIO()
    PlainConsole(file=text, width=width, force_terminal=False).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def markdown_text(text: str) -> str:
    """`text` escaped for Markdown."""
    return _MARKDOWN.sub(r"\\\g<0>", printable(text))


def markdown_code(text: str) -> str:
    """`text` as a code block."""
    fence = "`" * (1 + max([2, *map(len, re.findall("`+", text))]))
    return f"{fence}\n{printable(text, keep=chr(10))}\n{fence}"


def markdown_table(rows: Cells) -> str:
    """The table in GitHub's Markdown, with columns aligned right except the first."""
    rule = ["---", *["---:"] * (len(rows[0]) - 1)]
    header, *body = ([markdown_text(cell) for cell in row] for row in rows)
    return "".join(f"| {' | '.join(row)} |\n" for row in (header, rule, *body))


def _scaled(value: float, base: int, units: Sequence[str]) -> str:
    """`value` in the largest unit in which it is at least 1; each unit is `base` times the one before."""
    power = 0
    while value >= base and power + 1 < len(units):
        value, power = value / base, power + 1
    return f"{value:.3g}{units[power]}" if value < 1000 else f"{value:.0f}{units[power]}"
