"""The files that a comparison leaves in its folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock

from fedra_engine.comparison.figures import plot_accuracy_by_round
from fedra_engine.comparison.runs import Outcome, RunResult
from fedra_engine.comparison.summaries import summarize
from fedra_engine.comparison.tables import cells, csv_text, latex_table
from fedra_engine.files import whole_file, write_whole
from fedra_engine.reporting.tables import Cells, markdown_table

_EXPLANATION = """\
Top-1 accuracy (%) on each domain's test set and on average, mean ± sample standard deviation over the seeds; `frozen`
is the average before the first round. `trainable` parameters and `upload` are means over participants and rounds: what
a participant trains, and what of it the server receives. `TFLOP` is what the training of all participants takes in a
run, forward and backward through the blocks they hold; it is counted, not measured
(`fedra_engine/counting.py` has the formula). `seconds` is the measured time of a run's rounds, without
evaluations."""

_FILES = ("comparison.csv", "comparison.md", "comparison.tex", "accuracy_by_round.png")


def write_report(folder: Path, command: str, results: Sequence[RunResult], missing: Sequence[Outcome]) -> Cells:
    """Write comparison.csv, .md and .tex and accuracy_by_round.png.

    Args:
        folder: where to.
        command: that made the results.
        results: of all finished runs, at least one.
        missing: the others.

    Returns:
        The table.
    """
    summaries = summarize(results)
    rows = cells(summaries)
    # Another process may be writing the report of another part of the runs.
    table, page, latex, plot = (folder / name for name in _FILES)
    with _lock(folder):
        write_whole(table, csv_text(results))
        write_whole(page, _markdown(command, rows, results, missing))
        # An argument may have several lines.
        comment = "".join(f"% {line}\n" for line in command.splitlines())
        write_whole(latex, comment + latex_table(rows))
        with whole_file(plot) as temporary:
            plot_accuracy_by_round(summaries, temporary)
    return rows


def remove_report(folder: Path) -> None:
    """Remove what an earlier command reported: the tables are those of the latest one, which has none."""
    with _lock(folder):
        for name in _FILES:
            (folder / name).unlink(missing_ok=True)


def _lock(folder: Path) -> FileLock:
    return FileLock(folder / ".comparison.lock")


def _markdown(command: str, rows: Cells, results: Sequence[RunResult], missing: Sequence[Outcome]) -> str:
    parts = ["# Comparison", f"```\n{command}\n```", _EXPLANATION, markdown_table(rows).rstrip()]
    # Of every seed of a method the same.
    cautions = dict.fromkeys(f"- {result.label}: {result.caution}" for result in results if result.caution)
    if cautions:
        parts.append("\n".join(["Notes:\n", *cautions]))
    if missing:
        lines = (f"- {outcome.run.title}: {outcome.note}" for outcome in missing)
        parts.append("\n".join(["Not in the table:\n", *lines]))
    parts.append("![average accuracy by round](accuracy_by_round.png)")
    return "\n\n".join(parts) + "\n"
