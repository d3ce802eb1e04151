"""The GPU report's short table, JSON and markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from fedra_engine.benchmarks.gpu.stages import StageOutcome


def read_findings(folder: Path, outcomes: Sequence[StageOutcome]) -> dict[str, Any]:
    """What each stage left in its file; a stage that did not start left none."""
    found = {}
    for outcome in outcomes:
        path = folder / f"{outcome.stage}.json"
        found[outcome.stage] = json.loads(path.read_text()) if path.exists() else {"figures": [], "tables": {}}
    return found


def write_report(
    folder: Path, device: str, versions: str, outcomes: Sequence[StageOutcome], found: Mapping[str, Any]
) -> None:
    """Write `report.json` and `report.md`."""
    stages = [asdict(outcome) | found[outcome.stage] for outcome in outcomes]
    content = {"device": device, "versions": versions, "stages": stages}
    (folder / "report.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    (folder / "report.md").write_text(_markdown(device, versions, stages))


def short_table(device: str, outcomes: Sequence[StageOutcome], found: Mapping[str, Any]) -> Table:
    """Every figure beside its target, and how the stages ended."""
    table = Table(title=device, title_justify="left")
    table.add_column("stage")
    table.add_column("figure")
    for column in ("measured", "target", "met"):
        table.add_column(column, justify="right")
    for outcome in outcomes:
        for figure in found[outcome.stage]["figures"]:
            table.add_row(outcome.stage, figure["name"], *_cells(figure))
        ending = f"FAILED: {outcome.error}" if outcome.error else "done"
        table.add_row(
            outcome.stage, ending, f"{outcome.seconds:.0f} s", "", "", style="red" if outcome.error else "dim"
        )
    return table


def _cells(figure: Mapping[str, Any]) -> tuple[str, str, str]:
    met = {None: "", True: "yes", False: "NO"}[figure["met"]]
    return f"{_number(figure['value'])} {figure['unit']}".strip(), figure["target"], met


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _markdown(device: str, versions: str, stages: Sequence[Mapping[str, Any]]) -> str:
    lines = [f"# Measured on {device}", "", versions, "", "Command: `python launchers/gpu_report.py OUTPUT_DIR`", ""]
    for stage in stages:
        lines += [f"## {stage['stage']}", "", stage["error"] and f"Failed: {stage['error']}", ""]
        if stage["figures"]:
            header = ("figure", "measured", "target", "met")
            lines += _rows(header, [(figure["name"], *_cells(figure)) for figure in stage["figures"]])
        for name, rows in stage["tables"].items():
            columns = list(dict.fromkeys(column for row in rows for column in row))
            cells = [[_number(row.get(column, "")) for column in columns] for row in rows]
            lines += [f"### {name}", "", *_rows(columns, cells)]
    return "\n".join(lines)


def _rows(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells] + [""]
