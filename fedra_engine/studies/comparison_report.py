"""The report of a comparison: tables in Markdown and LaTeX, all runs as CSV, and a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from fedra_engine.runtime.errors import printable
from fedra_engine.runtime.measure_text import percent_number
from fedra_engine.runtime.tables import Cells, markdown_code, markdown_table, markdown_text, number_text
from fedra_engine.studies.outcomes import SampleOutcomes
from fedra_engine.studies.references import FROZEN, PROBE, References
from fedra_engine.studies.report import ReportFiles, csv_text, grouped, png
from fedra_engine.studies.results import RunResult
from fedra_engine.studies.statistics import is_rising, mcnemar, paired_difference, standard_error

BELOW = "▼"
REPORT = ReportFiles(".comparison.lock", ("comparison.csv", "comparison.md", "comparison.tex", "accuracy_by_round.png"))
_NONE = "–"
_ACCURACY = """\
Top-1 accuracy (%) by domain and on average, measured on {samples}: mean ± sample standard deviation over the seeds.
`s.e.` is the standard error that the number of these samples gives the average of one seed (binomial in each domain;
where clients have models of their own, it is at most that)."""
_FROZEN = f"""\
The row `{FROZEN}` is the whole model before any training, the column the part of it that a method starts from."""
_BELOW = f"""\
The `{PROBE}` is a linear classifier on the frozen model's features, fitted to the training samples of all clients;
{BELOW} marks averages below it. Their curve is `rising` if the average (the mean over the seeds) at the last evaluation
is more than one s.e. above that at the last evaluation within the first three quarters of the rounds, else `flat`; it
is not called either where seeds ended after different numbers of rounds."""
_SEEDS = """\
Average accuracy minus that of {baseline} with the same seed, in percentage points: mean, standard error, and
two-sided p-value of a paired t-test over the seeds. The seeds share the pretrained model and the source's samples, so
this says nothing of other models or data."""
_SAMPLES = """\
Samples of all domains that only {baseline} : only the method predicts correctly, and the two-sided p-value of
McNemar's exact test; {none} where clients have models of their own or samples differ. The samples of one seed share
the two trained models, so this compares these, and not what the methods give with another seed. No p-value is
corrected for their number."""
_COSTS = """\
`trainable` parameters and `upload` are means over participants and rounds: what a participant trains, and what of it
the server receives. `TFLOP` is what the training of all participants takes in a run, forward and backward through the
blocks they hold; it is counted, not measured (`fedra_engine/costs/model.py` has the formula). `seconds` is the
measured time of a run's rounds, without evaluations."""
_GRID = """\
Average accuracy (%) of one seed on validation samples, which were taken out of training. The best point of a method,
the earlier of equals, has trained on all training samples for the tables above. Where it is at the edge of the grid,
better values may lie beyond."""
_ERROR_SHORT = "s.e. is the standard error that the number of {samples} gives the average."
_SPREAD_SHORT = "± is the standard deviation over the seeds."
_BELOW_SHORT = f"{BELOW} marks averages below the {PROBE}, a linear classifier on the frozen model's features."
_RISING_SHORT = "rising or flat: whether the average was still rising at the end."
_COSTS_SHORT = """\
trainable and upload: of one participant in one round; TFLOP and seconds: of a whole run."""
_SEEDS_SHORT = """\
The difference is that from {baseline} with the same seed, in points of the average; s.e. is its standard error, and p
the probability that chance alone gives one as large (paired t-test)."""
_SAMPLES_SHORT = """\
For example, 8 : 5 means 8 samples that only {baseline} predicts correctly, and 5 that only the method does; p is the
probability that chance alone divides them as unevenly (McNemar's test)."""
_NONE_SHORT = {
    "accuracy": f"{_NONE}: not measured, or not defined where a sample has many predictions.",
    "seeds": f"{_NONE}: fewer than two seeds of both methods, or the same difference in all.",
    "samples": f"{_NONE}: a run or its predictions are missing, or its samples are others.",
    "grid": f"{_NONE}: the run has failed.",
}
_TEX_WORDS = {"\\": "backslash", "^": "asciicircum", "~": "asciitilde", "<": "less", ">": "greater", "|": "bar"}
_TEX = (
    {"±": r"$\pm$", "–": "--", BELOW: r"$\blacktriangledown$"}
    | {character: f"\\{character}" for character in "&%$#_{}"}
    | {character: rf"\text{word}{{}}" for character, word in _TEX_WORDS.items()}
)
_LINE_STYLES = ("-", "--", ":", "-.")


class TriedPoint(NamedTuple):
    """A point of the grid for the method `label`: its average validation accuracy (0 to 1), None if its run failed."""

    label: str
    point: str
    accuracy: float | None
    chosen: bool
    at_edge: tuple[str, ...]


@dataclass(frozen=True)
class Findings:
    """What a comparison has found.

    Attributes:
        command: that was typed.
        samples: what accuracies were measured on: `test samples` or `validation samples`.
        baseline: label of the method that the others are tested against.
        results: of finished runs, at least one.
        references: of the seeds.
        tried: points of the grid.
        missing: why other runs are missing, by title.
    """

    command: str
    samples: str
    baseline: str
    results: Sequence[RunResult]
    references: Sequence[References] = ()
    tried: Sequence[TriedPoint] = ()
    missing: Mapping[str, str] = field(default_factory=dict)

    @property
    def seeds(self) -> list[int]:
        """In order of appearance."""
        return list(dict.fromkeys(result.seed for result in self.results))


class Section(NamedTuple):
    """A table, what a page says before and after it, and what a terminal says after it of its signs."""

    title: str
    text: str
    rows: Cells
    after: str = ""
    legend: Sequence[str] = ()


def write_report(folder: Path, findings: Findings) -> list[Section]:
    """Write comparison.csv, .md and .tex and accuracy_by_round.png into `folder`, and return the tables."""
    sections = tables(findings)
    # Arguments may contain line breaks.
    comment = "".join(f"% {printable(line)}\n" for line in findings.command.splitlines())
    latex = comment + "\n".join(f"% {section.title}\n{latex_table(section.rows)}" for section in sections)
    # Domains are named after folders, which need not be UTF-8. A tight figure has room for long labels.
    picture = png(_accuracy_by_round(findings), bbox_inches="tight")
    content = _csv(findings).encode(errors="surrogateescape")
    REPORT.write(folder, content, _markdown(findings, sections), latex, picture)
    return sections


def tables(findings: Findings) -> list[Section]:
    """All tables for which there are enough results; accuracy and costs are the first."""
    sections = [_accuracy(findings), _costs(findings.results)]
    by_label = grouped(findings.results, "label")
    others = [label for label in by_label if label != findings.baseline]
    if findings.baseline in by_label and others:
        if len(findings.seeds) > 1:
            sections.append(_over_seeds(findings.baseline, by_label, others))
        if any(run.outcomes.correct for run in by_label[findings.baseline]):
            sections.append(_over_samples(findings, by_label, others))
    if findings.tried:
        sections.append(_grid(findings.tried))
    return sections


def _accuracy(findings: Findings) -> Section:
    domains = list(dict.fromkeys(domain for result in findings.results for domain in result.accuracy))
    rows = [["method", "seeds", *domains, "average", "s.e.", FROZEN, PROBE]]
    for name, found in _by_seed(findings.references).items():
        tests = [each.tests for each in findings.references]
        rows.append([name, str(len(found)), *_spreads(list(found.values()), tests, domains), "", ""])
    for label, seeds in grouped(findings.results, "label").items():
        tests = [run.outcomes.tests for run in seeds]
        accuracies = _spreads([run.accuracy for run in seeds], tests, domains)
        frozen = percent_number(mean(mean(run.frozen.values()) for run in seeds))
        rows.append([label, str(len(seeds)), *accuracies, frozen, _mark(seeds, findings.references)])
    after = [text for name, text in ((FROZEN, _FROZEN), (PROBE, _BELOW)) if name in _by_seed(findings.references)]
    words = {word for row in rows[1:] for cell in row for word in cell.split()}
    signs = {"±": _SPREAD_SHORT, BELOW: _BELOW_SHORT, "rising": _RISING_SHORT, "flat": _RISING_SHORT}
    signs[_NONE] = _NONE_SHORT["accuracy"]
    legend = [_ERROR_SHORT.format(samples=findings.samples)]
    legend += dict.fromkeys(text for sign, text in signs.items() if sign in words)
    return Section("Accuracy", _ACCURACY.format(samples=findings.samples), rows, "\n".join(after), legend)


def _by_seed(references: Sequence[References]) -> dict[str, dict[int, dict[str, float]]]:
    """Accuracies by domain of the frozen model and, where there is one, of the probe, by name and seed."""
    found = {FROZEN: {each.seed: each.frozen for each in references}}
    found[PROBE] = {each.seed: each.probe for each in references if each.probe is not None}
    return {name: by_seed for name, by_seed in found.items() if by_seed}


def _spreads(
    accuracies: Sequence[Mapping[str, float]], tests: Sequence[Mapping[str, int] | None], domains: Sequence[str]
) -> list[str]:
    """Cells of a row: each domain's accuracy, the average, and its standard error in one seed."""
    cells = [_spread([found[domain] for found in accuracies if domain in found]) for domain in domains]
    error = _mean_error(accuracies, tests)
    average = _spread([mean(found.values()) for found in accuracies])
    return [*cells, average, percent_number(error)]


def _spread(values: Sequence[float]) -> str:
    """Mean ± sample standard deviation in percent; the mean alone of one value, and a dash for none."""
    if not values:
        return _NONE
    spread = f" ± {percent_number(stdev(values))}" if len(values) > 1 else ""
    return percent_number(mean(values)) + spread


def _mean_error(accuracies: Sequence[Mapping[str, float]], tests: Sequence[Mapping[str, int] | None]) -> float | None:
    """Mean over the seeds of the averages' standard errors; None where samples have many predictions."""
    errors = [
        standard_error(found, counts) for found, counts in zip(accuracies, tests, strict=True) if counts is not None
    ]
    return mean(errors) if errors else None


def _mark(seeds: Sequence[RunResult], references: Sequence[References]) -> str:
    """Whether the runs of a method are below the probe of the same samples, and if so, whether they were rising."""
    known = {each.seed: each for each in references if each.probe is not None}
    pairs = [
        (run.average, mean((known[run.seed].probe or {}).values()))
        for run in seeds
        if run.seed in known and run.outcomes.tests == known[run.seed].tests
    ]
    if not pairs or mean(average for average, _ in pairs) >= mean(probe for _, probe in pairs):
        return ""
    error = _mean_error([run.accuracy for run in seeds], [run.outcomes.tests for run in seeds])
    rising = None if error is None or len(_ends(seeds)) > 1 else is_rising(_mean_curve(seeds), error)
    return BELOW + {None: "", True: " rising", False: " flat"}[rising]


def _ends(seeds: Sequence[RunResult]) -> list[int]:
    """After how many rounds the runs ended; several if a callback ended some early."""
    return sorted({run.rounds for run in seeds})


def _mean_curve(seeds: Sequence[RunResult]) -> dict[int, float]:
    """Mean over seeds, by number of rounds, where all seeds were evaluated."""
    rounds = sorted(set.intersection(*(set(run.curve) for run in seeds)))
    return {round: mean(run.curve[round] for run in seeds) for round in rounds}


def _costs(results: Sequence[RunResult]) -> Section:
    rows = [["method", "trainable", "upload (kB)", "TFLOP", "seconds"]]
    for label, seeds in grouped(results, "label").items():
        amounts = (
            mean(run.costs.uploaded_bytes for run in seeds) / 1e3,
            mean(run.costs.training_flops for run in seeds) / 1e12,
            mean(run.seconds for run in seeds),
        )
        rows.append(
            [label, f"{mean(run.costs.trainable_parameters for run in seeds):,.0f}", *map(number_text, amounts)]
        )
    return Section("Costs", _COSTS, rows, legend=[_COSTS_SHORT])


def _over_seeds(baseline: str, by_label: Mapping[str, Sequence[RunResult]], others: Sequence[str]) -> Section:
    firsts = {run.seed: run.average for run in by_label[baseline]}
    rows = [["method", "seeds", "difference", "s.e.", "p"]]
    for label in others:
        pairs = [(run.average, firsts[run.seed]) for run in by_label[label] if run.seed in firsts]
        found = paired_difference([one for one, _ in pairs], [first for _, first in pairs])
        cells = (
            [_NONE] * 3 if found is None else [f"{100 * found.mean:+z.1f}", percent_number(found.error), _p(found.p)]
        )
        rows.append([label, str(len(pairs)), *cells])
    text = _SEEDS.format(baseline=f"`{markdown_text(baseline)}`")
    legend = [_SEEDS_SHORT.format(baseline=baseline), *_dashes(rows, "seeds")]
    return Section("Differences over seeds", text, rows, legend=legend)


def _over_samples(findings: Findings, by_label: Mapping[str, Sequence[RunResult]], others: Sequence[str]) -> Section:
    outcomes = {(run.label, run.seed): run.outcomes for run in findings.results}
    rows = [["method", *(f"seed {seed}" for seed in findings.seeds)]]
    for label in others:
        pairs = [(outcomes.get((findings.baseline, seed)), outcomes.get((label, seed))) for seed in findings.seeds]
        rows.append([label, *(_discordant(first, other) for first, other in pairs)])
    text = _SAMPLES.format(baseline=f"`{markdown_text(findings.baseline)}`", none=_NONE)
    legend = [_SAMPLES_SHORT.format(baseline=findings.baseline), *_dashes(rows, "samples")]
    return Section("Differences on the samples of a seed", text, rows, legend=legend)


def _discordant(first: SampleOutcomes | None, other: SampleOutcomes | None) -> str:
    if first is None or other is None or not first.correct or not other.correct or first.samples != other.samples:
        return _NONE
    test = mcnemar("".join(first.correct.values()), "".join(other.correct.values()))
    return f"{test.only_first} : {test.only_second} (p = {_p(test.p)})"


def _p(value: float) -> str:
    return f"{value:.2g}"


def _grid(tried: Sequence[TriedPoint]) -> Section:
    rows = [["method", "point", "validation", "chosen"]]
    for each in tried:
        edge = f", at the edge of {' and '.join(each.at_edge)}" if each.at_edge else ""
        accuracy = percent_number(each.accuracy)
        rows.append([each.label, each.point, accuracy, f"yes{edge}" if each.chosen else ""])
    return Section("Grid", _GRID, rows, legend=_dashes(rows, "grid"))


def _dashes(rows: Cells, table: str) -> list[str]:
    """What a dash means in this table, if there is one."""
    return [_NONE_SHORT[table]] if any(_NONE in row for row in rows) else []


def _markdown(findings: Findings, sections: Sequence[Section]) -> str:
    parts = ["# Comparison", markdown_code(findings.command)]
    for section in sections:
        parts += [f"## {section.title}", section.text, markdown_table(section.rows).rstrip()]
        parts += [section.after] if section.after else []
    # The same for every seed of a method.
    cautions = dict.fromkeys(f"{result.label}: {result.caution}" for result in findings.results if result.caution)
    uneven = [
        f"{label}: seeds ended after {', '.join(map(str, ends))} rounds; tables have each at its own end, the curve "
        "stops at the first"
        for label, seeds in grouped(findings.results, "label").items()
        if len(ends := _ends(seeds)) > 1
    ]
    unfinished = [f"{title}: {note}" for title, note in findings.missing.items()]
    for title, lines in (("Notes:\n", [*cautions, *uneven]), ("Not in the tables:\n", unfinished)):
        if lines:
            parts.append("\n".join([title, *(f"- {markdown_text(line)}" for line in lines)]))
    parts.append("![average accuracy by round](accuracy_by_round.png)")
    return "\n\n".join(parts) + "\n"


def latex_table(rows: Cells) -> str:
    """The table as a `tabular`, which needs the packages booktabs and, for its mark, amssymb."""
    header, *body = (
        " & ".join("".join(_TEX.get(character, character) for character in printable(cell)) for cell in row) + r" \\"
        for row in rows
    )
    begin = rf"\begin{{tabular}}{{l{'r' * (len(rows[0]) - 1)}}}"
    return "\n".join([begin, r"\toprule", header, r"\midrule", *body, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _csv(findings: Findings) -> str:
    """One line for each run, or reference of a seed, and domain; accuracies from 0 to 1."""
    lines, tests = list[dict[str, object]](), {each.seed: each.tests for each in findings.references}
    for run in findings.results:
        costs = {"rounds": run.rounds, "seconds": run.seconds} | asdict(run.costs)
        for line in _csv_lines(run.label, run.seed, run.accuracy, run.outcomes.tests):
            lines.append(line | {"frozen_accuracy": run.frozen[str(line["domain"])]} | costs)
    for name, by_seed in _by_seed(findings.references).items():
        for seed, accuracy in by_seed.items():
            lines += _csv_lines(name, seed, accuracy, tests[seed])
    return csv_text(lines)


def _csv_lines(
    method: str, seed: int, accuracy: Mapping[str, float], tests: Mapping[str, int] | None
) -> list[dict[str, object]]:
    return [
        {"method": method, "seed": seed, "domain": domain, "accuracy": value}
        | {"standard_error": None if tests is None else standard_error({domain: value}, tests)}
        for domain, value in accuracy.items()
    ]


def _accuracy_by_round(findings: Findings) -> Any:
    """Plot each method's mean over domains and seeds, with a band of ± one standard deviation over the seeds."""
    from matplotlib.colors import TABLEAU_COLORS
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 5), dpi=150)
    axes = figure.subplots()
    colors = list(TABLEAU_COLORS)
    for index, (label, seeds) in enumerate(grouped(findings.results, "label").items()):
        color, style = colors[index % len(colors)], _LINE_STYLES[index % len(_LINE_STYLES)]
        curve = {round: 100 * value for round, value in _mean_curve(seeds).items()}
        axes.plot(list(curve), list(curve.values()), style, color=color, marker=".", label=printable(label))
        if len(seeds) > 1:
            stds = [100 * stdev(run.curve[round] for run in seeds) for round in curve]
            pairs = list(zip(curve.values(), stds, strict=True))
            lower, upper = ([value + sign * std for value, std in pairs] for sign in (-1, 1))
            axes.fill_between(list(curve), lower, upper, color=color, alpha=0.12, linewidth=0)
    for style, (name, by_seed) in zip(_LINE_STYLES[1:], _by_seed(findings.references).items(), strict=False):
        level = 100 * mean(mean(found.values()) for found in by_seed.values())
        axes.axhline(level, linestyle=style, color="black", linewidth=1, label=name)
    axes.set(xlabel="round", ylabel="average accuracy (%)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    legend = axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    for text in legend.get_texts():
        # Labels may contain dollar signs, between which matplotlib expects a formula.
        text.set_parse_math(False)
    return figure
