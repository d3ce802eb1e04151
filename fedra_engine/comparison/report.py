"""The files that a comparison leaves in its folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock

from fedra_engine.comparison.figures import plot_accuracy_by_round
from fedra_engine.comparison.runs import Outcome, RunResult
from fedra_engine.comparison.summaries import summarize
from fedra_engine.comparison.tables import cells, csv_text, latex_table
from fedra_engine.runtime.errors import printable
from fedra_engine.runtime.files import check_own, whole_file, write_whole
from fedra_engine.runtime.tables import Cells, markdown_code, markdown_table, markdown_text

_EXPLANATION = """\
Top-1 accuracy (%) on each domain's test set and on average, mean ± sample standard deviation over the seeds; `frozen`
is the average before the first round. `trainable` parameters and `upload` are means over participants and rounds: what
a participant trains, and what of it the server receives. `TFLOP` is what the training of all participants takes in a
run, forward and backward through the blocks they hold; it is counted, not measured
(`fedra_engine/costs/counting.py` has the formula). `seconds` is the measured time of a run's rounds, without
evaluations."""

_LOCK = ".comparison.lock"
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
    table, page, latex, plot = _files(folder)
    with _lock(folder):
        # Names of folders need not be UTF-8.
        write_whole(table, csv_text(results).encode(errors="surrogateescape"))
        write_whole(page, _markdown(command, rows, results, missing))
        # An argument may have several lines.
        comment = "".join(f"% {printable(line)}\n" for line in command.splitlines())
        write_whole(latex, comment + latex_table(rows))
        with whole_file(plot) as temporary:
            plot_accuracy_by_round(summaries, temporary)
    return rows


def check_report(folder: Path) -> None:
    """Raises InputError if a report would replace files that no comparison wrote."""
    check_own(_files(folder), folder / _LOCK)


def remove_report(folder: Path) -> None:
    """Remove what an earlier command reported: the tables are those of the latest one, which has none."""
    with _lock(folder):
        for file in _files(folder):
            file.unlink(missing_ok=True)


def _lock(folder: Path) -> FileLock:
    return FileLock(folder / _LOCK)


def _files(folder: Path) -> list[Path]:
    return [folder / name for name in _FILES]


def _markdown(command: str, rows: Cells, results: Sequence[RunResult], missing: Sequence[Outcome]) -> str:
    parts = ["# Comparison", markdown_code(command), _EXPLANATION, markdown_table(rows).rstrip()]
    # Of every seed of a method the same.
    cautions = dict.fromkeys(f"{result.label}: {result.caution}" for result in results if result.caution)
    unfinished = [f"{outcome.run.title}: {outcome.note}" for outcome in missing]
    for title, lines in (("Notes:\n", cautions), ("Not in the table:\n", unfinished)):
        if lines:
            parts.append("\n".join([title, *(f"- {markdown_text(line)}" for line in lines)]))
    parts.append("![average accuracy by round](accuracy_by_round.png)")
    return "\n\n".join(parts) + "\n"
