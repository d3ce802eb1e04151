"""The comparison as a table: for a terminal, in markdown, in LaTeX; and all runs as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from rich.table import Table

from fedra_engine.comparison.runs import RunResult
from fedra_engine.comparison.summaries import MethodSummary, Spread

CSV_FIELDS = (
    "method",
    "seed",
    "domain",
    "accuracy",
    "frozen_accuracy",
    "rounds",
    "seconds",
    "trainable_parameters",
    "uploaded_bytes",
    "training_flops",
)
_COSTS = ("trainable", "upload (kB)", "TFLOP", "seconds")
_TEX = {"\\": r"\textbackslash{}", "±": r"$\pm$", "–": "--"} | {c: f"\\{c}" for c in "&%$#_{}"}

Cells = list[list[str]]
"""Rows of a table, the header first."""


def cells(summaries: Sequence[MethodSummary]) -> Cells:
    """All rows: accuracies in percent, mean ± standard deviation over seeds; then the costs."""
    domains = list(dict.fromkeys(domain for summary in summaries for domain in summary.accuracy))
    header = ["method", "seeds", *domains, "average", "frozen", *_COSTS]
    return [header, *(_row(summary, domains) for summary in summaries)]


def _row(summary: MethodSummary, domains: Sequence[str]) -> list[str]:
    accuracies = [_spread(summary.accuracy.get(domain)) for domain in domains]
    return [
        summary.label,
        str(summary.seeds),
        *accuracies,
        _spread(summary.average),
        f"{100 * summary.frozen:.1f}",
        f"{summary.trainable_parameters:,.0f}",
        _number(summary.uploaded_bytes / 1e3),
        _number(summary.training_flops / 1e12),
        _number(summary.seconds),
    ]


def _spread(spread: Spread | None) -> str:
    if spread is None:
        return "–"
    return f"{100 * spread.mean:.1f} ± " + ("–" if spread.std is None else f"{100 * spread.std:.1f}")


def _number(value: float) -> str:
    """At least three digits that count, and never an exponent where people would write none."""
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


def latex_table(rows: Cells) -> str:
    """A `tabular` that needs the package booktabs."""
    header, *body = (_line(row) for row in rows)
    columns = "l" + "r" * (len(rows[0]) - 1)
    lines = [
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        header,
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


def _line(row: Sequence[str]) -> str:
    return " & ".join("".join(_TEX.get(character, character) for character in cell) for cell in row) + r" \\"


def csv_text(results: Sequence[RunResult]) -> str:
    """One line for each run and domain; accuracies from 0 to 1."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_FIELDS)
    for result in results:
        costs = result.costs
        for domain, accuracy in result.accuracy.items():
            of_run = (result.rounds, result.seconds, costs.trainable_parameters, costs.uploaded_bytes)
            writer.writerow(
                (result.label, result.seed, domain, accuracy, result.frozen[domain], *of_run, costs.training_flops)
            )
    return text.getvalue()
