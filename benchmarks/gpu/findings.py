"""What a stage of the GPU report finds, on disk as soon as it is known."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedra_engine.runtime.files import write_whole


@dataclass(frozen=True)
class Figure:
    """A figure of the report.

    Attributes:
        target, met: what it should reach, and whether it does; figures with a target are in the short table.
        expected: the same figure by counted bytes and FLOPs at the measured peaks, where there is one.
    """

    name: str
    value: float
    unit: str = ""
    target: str = ""
    met: bool | None = None
    expected: float | None = None


FAR_OFF = 0.25
"""The part of an expected figure by which a measured one may differ without being named."""


def far_off(value: float, expected: float) -> str:
    """How a figure is named that is far from the expected one, else empty."""
    if abs(value - expected) <= FAR_OFF * expected:
        return ""
    return "more" if value > expected else "less"


def beside_expected(seconds: float, expected: float, *, judged: bool = True) -> dict[str, object]:
    """The columns of a table that compare measured with expected seconds; `far_off` only where they are `judged`."""
    named = far_off(seconds, expected) if judged else ""
    return {"expected": expected, "over_expected": seconds / expected, "far_off": named}


class StageFailed(RuntimeError):
    """A stage ran to its end and found something wrong; the message is one line."""


class Findings:
    """Figures and rows of one stage in `<folder>/<stage>.json`, written again after every addition."""

    def __init__(self, folder: Path, stage: str, *, until: float) -> None:
        """`until` is the time of `time.monotonic()`, the same in all processes, at which the stage is stopped."""
        self.folder = folder
        self.figures: list[Figure] = []
        self.rows: dict[str, list[dict[str, Any]]] = {}
        self.csv = folder / f"{stage}.csv"
        """Where the stage may write kernel measurements."""
        self._left_out: list[str] = []
        self._error = ""
        self._path = folder / f"{stage}.json"
        self._until = until
        self._save()

    @property
    def seconds_left(self) -> float:
        """Time until the stage is stopped."""
        return self._until - time.monotonic()

    def figure(self, figure: Figure) -> None:
        """Add a figure."""
        self.figures.append(figure)
        self._save()

    def row(self, table: str, row: dict[str, Any]) -> None:
        """Add a row to one of the stage's tables."""
        self.rows.setdefault(table, []).append(row)
        self._save()

    def leave_out(self, what: str) -> None:
        """Say that the time did not suffice for something."""
        self._left_out.append(what)
        self._save()

    def fail(self, error: str) -> None:
        """Say in one line why the stage failed."""
        self._error = error
        self._save()

    def _save(self) -> None:
        content = {
            "figures": [asdict(figure) for figure in self.figures],
            "tables": self.rows,
            "left_out": self._left_out,
            "error": self._error,
        }
        write_whole(self._path, json.dumps(content, indent=1, ensure_ascii=False))


def read_stage(folder: Path, stage: str) -> dict[str, Any]:
    """What a stage has left in `folder` so far; a stage that did not start left nothing."""
    path = folder / f"{stage}.json"
    if path.exists():
        return dict(json.loads(path.read_text()))
    return {"figures": [], "tables": {}, "left_out": [], "error": ""}


def at_most(name: str, value: float, limit: float, unit: str = "", *, expected: float | None = None) -> Figure:
    """A figure that should be small."""
    return Figure(name, value, unit, f"≤ {limit:g}", value <= limit, expected)


def at_least(name: str, value: float, limit: float, unit: str = "", *, expected: float | None = None) -> Figure:
    """A figure that should be large."""
    return Figure(name, value, unit, f"≥ {limit:g}", value >= limit, expected)
