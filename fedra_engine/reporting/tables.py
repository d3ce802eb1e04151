"""Tables of text: for a terminal, and in markdown."""

from __future__ import annotations

from rich.table import Table

Cells = list[list[str]]
"""Rows of a table, the header first."""


def number_text(value: float) -> str:
    """At least three significant digits, and no exponent from 100 up."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def rich_table(rows: Cells) -> Table:
    """For a terminal."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for index, name in enumerate(rows[0]):
        table.add_column(name, justify="right" if index else "left", no_wrap=True)
    for row in rows[1:]:
        table.add_row(*(cell.replace("[", r"\[") for cell in row))
    return table


def markdown_table(rows: Cells) -> str:
    """GitHub's."""
    rule = ["---", *["---:"] * (len(rows[0]) - 1)]
    escaped = ([cell.replace("|", "\\|") for cell in row] for row in (rows[0], rule, *rows[1:]))
    return "".join(f"| {' | '.join(row)} |\n" for row in escaped)
