"""The comparison as a table, also in LaTeX; and all runs as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from fedra_engine.comparison.runs import RunResult
from fedra_engine.comparison.summaries import MethodSummary, Spread
from fedra_engine.runtime.errors import printable
from fedra_engine.runtime.tables import Cells, number_text

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
_TEX_WORDS = {"\\": "backslash", "^": "asciicircum", "~": "asciitilde", "<": "less", ">": "greater", "|": "bar"}
_TEX = (
    {"±": r"$\pm$", "–": "--"}
    | {character: f"\\{character}" for character in "&%$#_{}"}
    | {character: rf"\text{word}{{}}" for character, word in _TEX_WORDS.items()}
)


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
        number_text(summary.uploaded_bytes / 1e3),
        number_text(summary.training_flops / 1e12),
        number_text(summary.seconds),
    ]


def _spread(spread: Spread | None) -> str:
    if spread is None:
        return "–"
    return f"{100 * spread.mean:.1f}" + ("" if spread.std is None else f" ± {100 * spread.std:.1f}")


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
    return " & ".join("".join(_TEX.get(character, character) for character in printable(cell)) for cell in row) + r" \\"


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
