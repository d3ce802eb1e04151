"""Text on a terminal, in tables, and in Markdown. What users name is never taken for markup."""

from __future__ import annotations

import io
import re
from collections.abc import Collection
from typing import Any

from rich.console import Console  # noqa: TID251 - the one that all others are made of
from rich.table import Table
from rich.text import Text

from fedra_engine.runtime.errors import printable

Cells = list[list[str]]
"""Rows of a table, the header first."""
_WIDEST = 100_000
"""More columns than any table takes."""
_MARKDOWN = re.compile(r"[\\`*<>|~&$]|\](?=[(\[:])|(?<![^\W_])_|_(?![^\W_])")
"""What begins or ends markup. Between letters or digits, `_` does not."""


class PlainConsole(Console):
    """Prints text as it is: nothing is markup, an emoji or highlighted, and control characters appear as escapes."""

    def __init__(self, **options: Any) -> None:
        """Takes rich's `options`."""
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """All strings that are printed pass through here, those in tables, too."""
        return super().render_str(printable(text, keep="\n"), **options)


def number_text(value: float) -> str:
    """At least three significant digits, and no exponent from 100 up."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def rich_table(rows: Cells, left: Collection[int] = (0,)) -> Table:
    """The table as rich prints it on a terminal, columns to the right but for `left`, those of names."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for index, name in enumerate(rows[0]):
        table.add_column(printable(name), justify="left" if index in left else "right", no_wrap=True)
    for row in rows[1:]:
        table.add_row(*map(printable, row))
    return table


def table_text(table: Table, width: int = _WIDEST) -> str:
    """The table as lines of up to `width` columns, however narrow the terminal: that must not cut figures."""
    text = io.StringIO()
    PlainConsole(file=text, width=width).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def markdown_text(text: str) -> str:
    """`text` on one line, which shows as it is."""
    return _MARKDOWN.sub(r"\\\g<0>", printable(text))


def markdown_code(text: str) -> str:
    """`text` as a block of code."""
    fence = "`" * (1 + max([2, *map(len, re.findall("`+", text))]))
    return f"{fence}\n{printable(text, keep=chr(10))}\n{fence}"


def markdown_table(rows: Cells) -> str:
    """The table in GitHub's Markdown."""
    rule = ["---", *["---:"] * (len(rows[0]) - 1)]
    header, *body = ([markdown_text(cell) for cell in row] for row in rows)
    return "".join(f"| {' | '.join(row)} |\n" for row in (header, rule, *body))
