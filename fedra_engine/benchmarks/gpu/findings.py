"""What a stage of the GPU report finds, on disk as soon as it is known."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedra_engine.files import write_whole


@dataclass(frozen=True)
class Figure:
    """A figure for the short table; `met` is whether it reaches its target."""

    name: str
    value: float
    unit: str = ""
    target: str = ""
    met: bool | None = None


class StageFailed(RuntimeError):
    """A stage ran to its end and found something wrong; the message is one line."""


class Findings:
    """Figures and rows of one stage in `<folder>/<stage>.json`, written again after every addition."""

    def __init__(self, folder: Path, stage: str, *, seconds: float) -> None:
        self.folder = folder
        self.figures: list[Figure] = []
        self.rows: dict[str, list[dict[str, Any]]] = {}
        self._path = folder / f"{stage}.json"
        self._end = time.monotonic() + seconds
        self._save()

    @property
    def seconds_left(self) -> float:
        """Time until the stage is stopped."""
        return self._end - time.monotonic()

    def figure(self, figure: Figure) -> None:
        """Add a figure to the short table."""
        self.figures.append(figure)
        self._save()

    def row(self, table: str, row: dict[str, Any]) -> None:
        """Add a row to one of the stage's tables."""
        self.rows.setdefault(table, []).append(row)
        self._save()

    def _save(self) -> None:
        content = {"figures": [asdict(figure) for figure in self.figures], "tables": self.rows}
        write_whole(self._path, json.dumps(content, indent=1, ensure_ascii=False))


def at_most(name: str, value: float, limit: float, unit: str = "") -> Figure:
    """A figure that should be small."""
    return Figure(name, value, unit, f"≤ {limit:g}", value <= limit)


def at_least(name: str, value: float, limit: float, unit: str = "") -> Figure:
    """A figure that should be large."""
    return Figure(name, value, unit, f"≥ {limit:g}", value >= limit)
