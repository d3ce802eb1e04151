"""Results of finished runs and the report on them: a table in Markdown and LaTeX, all runs as CSV, and a figure."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from fedra_engine.callbacks.run_folder import RunFolder, reading
from fedra_engine.runtime.errors import InputError, printable
from fedra_engine.runtime.tables import Cells, markdown_code, markdown_table, markdown_text, number_text
from fedra_engine.studies.plan import PlannedRun
from fedra_engine.studies.report import ReportFiles, csv_text, grouped, png

COSTS = "costs.json"
"""File of `RunCosts` in a run's folder."""
REPORT = ReportFiles(".comparison.lock", ("comparison.csv", "comparison.md", "comparison.tex", "accuracy_by_round.png"))
_EXPLANATION = """\
Top-1 accuracy (%) on each domain's test set and on average, mean ± sample standard deviation over the seeds; `frozen`
is the average before the first round. `trainable` parameters and `upload` are means over participants and rounds: what
a participant trains, and what of it the server receives. `TFLOP` is what the training of all participants takes in a
run, forward and backward through the blocks they hold; it is counted, not measured
(`fedra_engine/costs/model.py` has the formula). `seconds` is the measured time of a run's rounds, without
evaluations."""
_TEX_WORDS = {"\\": "backslash", "^": "asciicircum", "~": "asciitilde", "<": "less", ">": "greater", "|": "bar"}
_TEX = (
    {"±": r"$\pm$", "–": "--"}
    | {character: f"\\{character}" for character in "&%$#_{}"}
    | {character: rf"\text{word}{{}}" for character, word in _TEX_WORDS.items()}
)
_LINE_STYLES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class RunCosts:
    """Counted costs of a run: means over rounds and participants whose updates arrive, and their FLOPs in total."""

    trainable_parameters: float
    uploaded_bytes: float
    training_flops: float


@dataclass(frozen=True)
class RunResult:
    """The results of a finished run; accuracies are from 0 to 1.

    Attributes:
        label: name of the method in tables.
        seconds: wall-clock time of the rounds, without evaluations.
        accuracy: top-1 accuracy by domain, after the last round.
        frozen: the same before the first round.
        curve: average accuracy over the domains, by number of rounds, where it was evaluated.
        caution: the method's caution about this setting, if any.
    """

    label: str
    seed: int
    rounds: int
    seconds: float
    accuracy: dict[str, float]
    frozen: dict[str, float]
    curve: dict[int, float]
    costs: RunCosts
    caution: str | None = None


def read_result(run: PlannedRun) -> RunResult:
    """Read the results of a finished run from its folder; InputError if a file is missing or damaged."""
    folder, costs_file, wanted = RunFolder.open(run.path), run.path / COSTS, "the file of a finished run as it was"
    with reading(folder.summary_file, wanted):
        summary = json.loads(folder.summary_file.read_text())
        rounds, frozen_average, caution = summary["rounds"], float(summary["average_frozen"]), summary.get("caution")
        accuracy, frozen = _accuracy(summary["tuned"]), _accuracy(summary["frozen"])
        if type(rounds) is not int or not isinstance(caution, str | None) or list(accuracy) != list(frozen):
            raise TypeError
    with reading(folder.metrics_file, wanted):
        records = folder.read_metrics()
        if [record["round"] for record in records] != list(range(rounds)):
            raise ValueError
        evaluated = {
            record["round"] + 1: mean(_accuracy(record["accuracy"]).values())
            for record in records
            if "accuracy" in record
        }
        seconds = sum(_amount(record["seconds"]) for record in records)
        kept = folder.kept_metrics_file
        if kept.is_file() and kept.read_bytes() != folder.metrics_file.read_bytes():
            raise InputError(f"{folder.metrics_file}: found other records than in {kept}, expected the same in both")
    with reading(folder.summary_file, wanted):
        if _accuracy(records[-1]["accuracy"]) != accuracy or not math.isclose(frozen_average, mean(frozen.values())):
            raise ValueError
    with reading(costs_file, wanted):
        costs = RunCosts(**{name: _amount(value) for name, value in json.loads(costs_file.read_text()).items()})
    curve = {0: frozen_average, **evaluated}
    return RunResult(run.label, run.config.seed, rounds, seconds, accuracy, frozen, curve, costs, caution)


def _accuracy(values: dict[str, float]) -> dict[str, float]:
    """Check that accuracies, by domain, are from 0 to 1."""
    checked = {str(domain): float(value) for domain, value in values.items()}
    if not checked or not all(0 <= value <= 1 for value in checked.values()):
        raise ValueError
    return checked


def _amount(value: float) -> float:
    """Check that a value is finite and not negative."""
    if type(value) not in (int, float) or not 0 <= value < math.inf:
        raise ValueError
    return float(value)


def write_report(folder: Path, command: str, results: Sequence[RunResult], missing: Mapping[str, str]) -> Cells:
    """Write comparison.csv, .md and .tex and accuracy_by_round.png into `folder`, and return the table.

    Args:
        command: the command that was typed.
        results: at least one.
        missing: why other runs are missing, by title.
    """
    rows = cells(results)
    # Arguments may contain line breaks.
    comment = "".join(f"% {printable(line)}\n" for line in command.splitlines())
    page, latex = _markdown(command, rows, results, missing), comment + latex_table(rows)
    # Domains are named after folders, which need not be UTF-8. A tight figure has room for long labels.
    picture = png(_accuracy_by_round(results), bbox_inches="tight")
    REPORT.write(folder, _csv(results).encode(errors="surrogateescape"), page, latex, picture)
    return rows


def cells(results: Sequence[RunResult]) -> Cells:
    """The table, one row for each method: accuracies in percent, mean ± standard deviation over seeds; mean costs."""
    domains = list(dict.fromkeys(domain for result in results for domain in result.accuracy))
    header = ["method", "seeds", *domains, "average", "frozen", "trainable", "upload (kB)", "TFLOP", "seconds"]
    return [header, *(_row(seeds, domains) for seeds in grouped(results, "label").values())]


def _row(seeds: Sequence[RunResult], domains: Sequence[str]) -> list[str]:
    accuracies = [_spread([run.accuracy[domain] for run in seeds if domain in run.accuracy]) for domain in domains]
    return [
        seeds[0].label,
        str(len(seeds)),
        *accuracies,
        _spread([mean(run.accuracy.values()) for run in seeds]),
        f"{100 * mean(mean(run.frozen.values()) for run in seeds):.1f}",
        f"{mean(run.costs.trainable_parameters for run in seeds):,.0f}",
        number_text(mean(run.costs.uploaded_bytes for run in seeds) / 1e3),
        number_text(mean(run.costs.training_flops for run in seeds) / 1e12),
        number_text(mean(run.seconds for run in seeds)),
    ]


def _spread(values: Sequence[float]) -> str:
    """Mean ± sample standard deviation in percent; the mean alone of one value, and a dash for none."""
    if not values:
        return "–"
    return f"{100 * mean(values):.1f}" + (f" ± {100 * stdev(values):.1f}" if len(values) > 1 else "")


def _markdown(command: str, rows: Cells, results: Sequence[RunResult], missing: Mapping[str, str]) -> str:
    parts = ["# Comparison", markdown_code(command), _EXPLANATION, markdown_table(rows).rstrip()]
    # The same for every seed of a method.
    cautions = dict.fromkeys(f"{result.label}: {result.caution}" for result in results if result.caution)
    unfinished = [f"{title}: {note}" for title, note in missing.items()]
    for title, lines in (("Notes:\n", cautions), ("Not in the table:\n", unfinished)):
        if lines:
            parts.append("\n".join([title, *(f"- {markdown_text(line)}" for line in lines)]))
    parts.append("![average accuracy by round](accuracy_by_round.png)")
    return "\n\n".join(parts) + "\n"


def latex_table(rows: Cells) -> str:
    """The table as a `tabular`, which needs the package booktabs."""
    header, *body = (
        " & ".join("".join(_TEX.get(character, character) for character in printable(cell)) for cell in row) + r" \\"
        for row in rows
    )
    begin = rf"\begin{{tabular}}{{l{'r' * (len(rows[0]) - 1)}}}"
    return "\n".join([begin, r"\toprule", header, r"\midrule", *body, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _csv(results: Iterable[RunResult]) -> str:
    """One line for each run and domain; accuracies from 0 to 1."""
    return csv_text(
        [
            {"method": run.label, "seed": run.seed, "domain": domain, "accuracy": accuracy}
            | {"frozen_accuracy": run.frozen[domain], "rounds": run.rounds, "seconds": run.seconds}
            | asdict(run.costs)
            for run in results
            for domain, accuracy in run.accuracy.items()
        ]
    )


def _accuracy_by_round(results: Iterable[RunResult]) -> Any:
    """Plot each method's mean over domains and seeds, with a band of ± one standard deviation over the seeds."""
    from matplotlib.colors import TABLEAU_COLORS
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 5), dpi=150)
    axes = figure.subplots()
    colors = list(TABLEAU_COLORS)
    for index, (label, seeds) in enumerate(grouped(results, "label").items()):
        color, style = colors[index % len(colors)], _LINE_STYLES[index % len(_LINE_STYLES)]
        # Only rounds at which all seeds were evaluated.
        rounds = sorted(set.intersection(*(set(run.curve) for run in seeds)))
        points = [[run.curve[round] for run in seeds] for round in rounds]
        means = [100 * mean(point) for point in points]
        axes.plot(rounds, means, style, color=color, marker=".", label=printable(label))
        if len(seeds) > 1:
            stds = [100 * stdev(point) for point in points]
            lower, upper = ([m + sign * s for m, s in zip(means, stds, strict=True)] for sign in (-1, 1))
            axes.fill_between(rounds, lower, upper, color=color, alpha=0.12, linewidth=0)
    axes.set(xlabel="round", ylabel="average accuracy (%)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    legend = axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    for text in legend.get_texts():
        # Labels may contain dollar signs, between which matplotlib expects a formula.
        text.set_parse_math(False)
    return figure
