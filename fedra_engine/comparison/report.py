"""The files that a comparison leaves in its folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock

from fedra_engine.comparison.figures import plot_accuracy_by_round
from fedra_engine.comparison.runs import Outcome, RunResult
from fedra_engine.comparison.summaries import summarize
from fedra_engine.comparison.tables import cells, csv_text, latex_table
from fedra_engine.reporting.tables import Cells, markdown_table

_EXPLANATION = """\
Top-1 accuracy (%) on each domain's test set and on average, mean ± sample standard deviation over the seeds; `frozen`
is the average before the first round. `trainable` parameters and `upload` are means over participants and rounds: what
a participant trains, and what of it the server receives. `TFLOP` is what the training of all participants takes in a
run, forward and backward through the blocks they hold; it is counted, not measured
(`fedra_engine/counting.py` has the formula). `seconds` is the measured time of a run's rounds, without
evaluations."""


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
    with FileLock(folder / ".comparison.lock"):
        (folder / "comparison.csv").write_text(csv_text(results))
        (folder / "comparison.md").write_text(_markdown(command, rows, missing))
        (folder / "comparison.tex").write_text(f"% {command}\n{latex_table(rows)}")
        plot_accuracy_by_round(summaries, folder / "accuracy_by_round.png")
    return rows


def _markdown(command: str, rows: Cells, missing: Sequence[Outcome]) -> str:
    parts = ["# Comparison", f"```\n{command}\n```", _EXPLANATION, markdown_table(rows).rstrip()]
    if missing:
        lines = (f"- {outcome.run.title}: {outcome.note}" for outcome in missing)
        parts.append("\n".join(["Not in the table:\n", *lines]))
    parts.append("![average accuracy by round](accuracy_by_round.png)")
    return "\n\n".join(parts) + "\n"
