"""Tables of an accuracy study, from its results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from fedra_engine.runtime.tables import markdown_text
from fedra_engine.studies.comparison_report import BELOW
from fedra_engine.studies.statistics import standard_error

REFERENCES = {"frozen": "frozen", "ridge probe": "probe"}
"""What tuning is compared with, by the name in tables: its key in the results of a seed."""
_NOTES = f"""\
Top-1 accuracy (%) on the test images. `±` is the standard error of the average that comes from the number of test
images alone; the difference of two methods has up to 1.4 times that. `since` is the change of the average since the
evaluation before, after the rounds in parentheses. {BELOW} marks an average below the ridge probe's: not yet worth its
training. The probe is a linear classifier on the frozen model's features, fitted to all clients' training images;
`frozen` is the frozen model with its untrained classifier."""


def markdown(results: Mapping[str, Any]) -> str:
    """All of `study.md`."""
    lines = ["# Accuracy study", ""]
    lines += [f"- {name}: {markdown_text(str(results[name]))}" for name in ("command", "device", "versions")]
    lines += [f"- setting: {', '.join(f'{name} {value}' for name, value in results['setting'].items())}"]
    for call in results["calls"]:
        lines.append(
            f"- call: {call['seconds']:.0f} s on {call['device']}, {call['rounds']} rounds of all methods together"
        )
    for seed, found in results["seeds"].items():
        lines += ["", f"## Seed {seed}", "", *_summary(found), "", "Every evaluation:", "", *_every_evaluation(found)]
        lines += ["", *_stopped(found)]
    if len(results["seeds"]) > 1:
        lines += ["", "## All seeds", "", *_over_seeds(results["seeds"])]
    return "\n".join([*lines, "", _NOTES, ""])


def short_table(results: Mapping[str, Any]) -> str:
    """The newest figures of every method, for a terminal."""
    lines = []
    for seed, found in results["seeds"].items():
        lines += [f"seed {seed}", *_summary(found)]
    return "\n".join(lines)


def evaluations(records: Sequence[Mapping[str, Any]]) -> dict[int, dict[str, float]]:
    """Accuracy by domain after each number of rounds that was evaluated."""
    return {record["round"] + 1: record["accuracy"] for record in records if "accuracy" in record}


def _summary(found: Mapping[str, Any]) -> list[str]:
    """The last evaluation of every method, below the frozen model and the probe."""
    header = ["method", "rounds", *found["tests"], "average", "±", "since", ""]
    rows = []
    for method, run in found["methods"].items():
        known = evaluations(run["records"])
        if not known:
            rows.append([method, "0", *[""] * (len(header) - 2)])
            continue
        last = max(known)
        before = max((round for round in known if round < last), default=None)
        since = ""
        if before is not None:
            change = mean(known[last].values()) - mean(known[before].values())
            since = f"{100 * change:+.1f} ({before})"
        rows.append([method, str(last), *_cells(known[last], found), since, _mark(known[last], found)])
    return _table(header, [*_reference_rows(found, ["", ""]), *rows])


def _every_evaluation(found: Mapping[str, Any]) -> list[str]:
    header = ["rounds", "method", *found["tests"], "average", "±", ""]
    known = {method: evaluations(run["records"]) for method, run in found["methods"].items()}
    rounds = sorted(set().union(*known.values()))
    rows = [
        [str(round), method, *_cells(of_method[round], found), _mark(of_method[round], found)]
        for round in rounds
        for method, of_method in known.items()
        if round in of_method
    ]
    references = [["", row[0], *row[2:]] for row in _reference_rows(found, [""])]
    return _table(header, [*references, *rows])


def _reference_rows(found: Mapping[str, Any], rest: list[str]) -> list[list[str]]:
    return [[name, "", *_cells(found[key], found), *rest] for name, key in REFERENCES.items()]


def _over_seeds(seeds: Mapping[str, Any]) -> list[str]:
    """Mean and sample standard deviation over seeds at the last number of rounds that all of them have evaluated."""
    by_method: dict[str, list[dict[int, dict[str, float]]]] = {}
    for found in seeds.values():
        for method, run in found["methods"].items():
            by_method.setdefault(method, []).append(evaluations(run["records"]))
    domains = list(next(iter(seeds.values()))["tests"])
    rows = [["ridge probe", "", *_spread([found["probe"] for found in seeds.values()], domains)]]
    for method, runs in by_method.items():
        common = set.intersection(*(set(run) for run in runs))
        if common and len(runs) == len(seeds):
            last = max(common)
            rows.append([method, str(last), *_spread([run[last] for run in runs], domains)])
    return _table(["method", "rounds", *domains, "average"], rows)


def _spread(accuracies: Sequence[Mapping[str, float]], domains: Sequence[str]) -> list[str]:
    columns = [[found[domain] for found in accuracies] for domain in domains]
    columns.append([mean(found.values()) for found in accuracies])
    return [f"{100 * mean(values):.1f} ± {100 * stdev(values):.1f}" for values in columns]


def _cells(accuracy: Mapping[str, float], found: Mapping[str, Any]) -> list[str]:
    values = [accuracy[domain] for domain in found["tests"]]
    numbers = [*values, mean(values), standard_error(accuracy, found["tests"])]
    return [f"{100 * value:.1f}" for value in numbers]


def _mark(accuracy: Mapping[str, float], found: Mapping[str, Any]) -> str:
    return BELOW if mean(accuracy.values()) < mean(found["probe"].values()) else ""


def _stopped(found: Mapping[str, Any]) -> list[str]:
    reasons = {method: run["stopped"] for method, run in found["methods"].items() if run["stopped"]}
    return [f"{method} stopped: {markdown_text(reason)}" for method, reason in reasons.items()]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Markdown that a terminal shows in columns, too."""
    cells = [[markdown_text(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    rule = ["-" * max(width, 3) for width in widths]
    head, *body = (_row(row, widths) for row in cells)
    return [head, "| " + " | ".join(rule) + " |", *body]


def _row(row: Sequence[str], widths: Sequence[int]) -> str:
    return "| " + " | ".join(cell.ljust(max(width, 3)) for cell, width in zip(row, widths, strict=True)) + " |"
