"""The GPU report as markdown, JSON and a short table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.table import Table

from benchmarks.gpu.findings import FAR_OFF, far_off
from benchmarks.gpu.machine import Machine
from fedra_engine.runtime.tables import markdown_code, markdown_text, table_text

_WIDTH = 150


@dataclass(frozen=True)
class Outcome:
    """How a stage ended, or that it runs; `error` is one line, empty when all went well."""

    stage: str
    seconds: float
    state: Literal["running", "done", "failed", "left out"]
    error: str

    @property
    def failed(self) -> bool:
        """Whether the stage ended with an error."""
        return self.state == "failed"

    @property
    def verdict(self) -> str:
        """What tables say of the stage: that it failed and why, else its remark or, without one, its state."""
        return f"FAILED: {self.error}" if self.failed else self.error or self.state


@dataclass(frozen=True)
class Report:
    """All that is known: `found` holds what each stage left (`findings.read_stage`)."""

    notice: str
    command: str
    machine: Machine
    outcomes: Sequence[Outcome]
    found: Mapping[str, Mapping[str, Any]]

    def as_dict(self) -> dict[str, Any]:
        """What `report.json` holds: notice, command, machine, and each stage's outcome with what it found."""
        stages = [
            asdict(outcome) | {k: v for k, v in self.found[outcome.stage].items() if k != "error"}
            for outcome in self.outcomes
        ]
        return {"notice": self.notice, "command": self.command, **asdict(self.machine), "stages": stages}


def figure_line(figure: Mapping[str, Any]) -> str:
    """A figure as a line of text."""
    measured, expected, target, met = _cells(figure)
    beside = [f"target {target}: {met}"] if target else []
    beside += [f"expected {expected}"] if expected else []
    return f"{figure['name']}: {measured}" + (f" ({'; '.join(beside)})" if beside else "")


def short_table(report: Report) -> list[str]:
    """Every figure with a target, what time did not suffice for, and how the stages ended."""
    table = Table(title=f"{report.machine.device}", title_justify="left")
    table.add_column("stage")
    table.add_column("figure")
    for column in ("measured", "expected", "target", "met"):
        table.add_column(column, justify="right")
    for outcome in report.outcomes:
        found = report.found[outcome.stage]
        for figure in found["figures"]:
            if figure["target"] or figure["expected"] is not None:
                table.add_row(outcome.stage, figure["name"], *_cells(figure))
        for what in found["left_out"]:
            table.add_row(outcome.stage, f"no time for {what}")
        table.add_row(outcome.stage, outcome.verdict, f"{outcome.seconds:.0f} s")
    return table_text(table, _WIDTH).splitlines()


def markdown(report: Report) -> str:
    """The whole report."""
    machine = report.machine
    lines = [f"# Measured on {machine.device}", ""]
    if report.notice:
        lines += [f"**{report.notice.strip(' |')}.**", ""]
    lines += [machine.versions, "", markdown_code(report.command), "", "## Verdicts", ""]
    rows = [(outcome.stage, outcome.verdict, f"{outcome.seconds:.1f}") for outcome in report.outcomes]
    lines += _rows(("stage", "verdict", "seconds"), rows)
    late = [(outcome.stage, what) for outcome in report.outcomes for what in report.found[outcome.stage]["left_out"]]
    if late:
        lines += ["## What there was no time for", "", *_rows(("stage", "what"), late)]
    figures = [
        (outcome.stage, figure) for outcome in report.outcomes for figure in report.found[outcome.stage]["figures"]
    ]
    header = ("stage", "figure", "measured", "expected", "target", "met")
    targets = [(stage, figure["name"], *_cells(figure)) for stage, figure in figures if figure["target"]]
    if targets:
        lines += ["## Targets", "", *_rows(header, targets)]
    if off := list(_far_off(report)):
        lines += [f"## More than {100 * FAR_OFF:.0f} % from what was expected", ""]
        lines += _rows(("stage", "what", "measured", "expected", "factor"), off)
    expected = [
        (
            stage,
            figure["name"],
            *_cells(figure)[:2],
            _number(figure["value"] / figure["expected"]),
            far_off(figure["value"], figure["expected"]),
        )
        for stage, figure in figures
        if figure["expected"]
    ]
    if expected:
        lines += [
            "## Measured beside expected",
            "",
            "Expected: counted bytes and FLOPs at the peaks measured here.",
            "",
        ]
        lines += _rows(("stage", "figure", "measured", "expected", "factor", "far off"), expected)
    for outcome in report.outcomes:
        lines += _stage(outcome.stage, report.found[outcome.stage])
    return "\n".join(lines)


def _far_off(report: Report) -> Iterator[tuple[str, ...]]:
    """Stage, name, measured, expected and factor of all that is far from what was expected."""
    for outcome in report.outcomes:
        found = report.found[outcome.stage]
        for figure in found["figures"]:
            if figure["expected"] and far_off(figure["value"], figure["expected"]):
                factor = figure["value"] / figure["expected"]
                yield outcome.stage, figure["name"], *_cells(figure)[:2], _number(factor)
        for row in (row for rows in found["tables"].values() for row in rows if row.get("far_off")):
            name = ", ".join(value for column, value in row.items() if isinstance(value, str) and column != "far_off")
            expected, factor = row["expected"], row["over_expected"]
            yield outcome.stage, name, f"{_number(factor * expected)} s", _number(expected), _number(factor)


def _stage(name: str, found: Mapping[str, Any]) -> list[str]:
    if not found["figures"] and not found["tables"]:
        return []
    lines = [f"## {name}", ""]
    if found["figures"]:
        rows = [(figure["name"], _cells(figure)[0]) for figure in found["figures"]]
        lines += _rows(("figure", "measured"), rows)
    for table, rows in found["tables"].items():
        columns = list(dict.fromkeys(column for row in rows for column in row))
        cells = [[_number(row.get(column, "")) for column in columns] for row in rows]
        lines += [f"### {table}", "", *_rows(columns, cells)]
    return lines


def _cells(figure: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """Measured, expected, target, met."""
    met = {None: "", True: "yes", False: "NO"}[figure["met"]]
    expected = "" if figure["expected"] is None else _number(figure["expected"])
    return f"{_number(figure['value'])} {figure['unit']}".strip(), expected, figure["target"], met


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _rows(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    head, *body = ([markdown_text(cell) for cell in row] for row in (header, *rows))
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body)] + [""]
