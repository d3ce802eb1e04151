"""Measurements as tables: for a terminal, in markdown and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from typing import Literal

import numpy as np

from fedra_engine.runtime.tables import Cells, number_text
from fedra_engine.scaling.measurement import Measurement
from fedra_engine.scaling.projection import Projection

FITTED_FROM = 100
"""Clients from which the exponent is fitted: a round of fewer is over before the lanes are full."""


def by_processes(measurements: Iterable[Measurement]) -> dict[int, list[Measurement]]:
    """The measurements of each number of processes, by rising number of clients."""
    groups: dict[int, list[Measurement]] = {}
    for measurement in sorted(measurements, key=lambda one: (one.processes, one.clients)):
        groups.setdefault(measurement.processes, []).append(measurement)
    return groups


def exponent(clients: Sequence[float], seconds: Sequence[float]) -> float:
    """k of the least-squares fit seconds = c · clientsᵏ on logarithms; at least two different numbers of clients."""
    slope, _ = np.polyfit(np.log(clients), np.log(seconds), 1)
    return float(slope)


def fitted_exponent(
    measurements: Sequence[Measurement], of: Literal["seconds", "busy_seconds"] = "seconds"
) -> float | None:
    """Of a round's time over its clients, `FITTED_FROM` or more; None with fewer than two such points."""
    some = [measurement for measurement in measurements if measurement.clients >= FITTED_FROM]
    if len(some) < 2:
        return None
    return exponent([one.clients for one in some], [getattr(one, of) for one in some])


def cells(measurements: Iterable[Measurement]) -> Cells:
    """One row for each point."""
    header = ["clients", "processes", "s/round", "busy s", "clients/s", "ms/client", "server ms/client"]
    rows = [_row(one) for group in by_processes(measurements).values() for one in group]
    return [[*header, "memory (MiB)", "GPU (MiB)", "up (MB)", "down (MB)", "rounds"], *rows]


def _row(one: Measurement) -> list[str]:
    return [
        f"{one.clients:,}",
        str(one.processes),
        number_text(one.seconds),
        number_text(one.busy_seconds),
        number_text(one.clients / one.seconds),
        number_text(1e3 * one.busy_seconds / one.clients),
        f"{1e3 * one.server_seconds / one.clients:.3f}",
        f"{one.memory / 2**20:,.0f}",
        f"{one.gpu_memory / 2**20:,.0f}" if one.gpu_memory else "–",
        number_text(one.uploaded / 1e6),
        number_text(one.downloaded / 1e6),
        str(one.rounds),
    ]


def projection_cells(projections: Sequence[Projection]) -> Cells:
    """One row for each number of processes."""
    header = ["clients", "processes", "s/round (computed)", "of it reduction (ms)", "efficiency (%)"]
    rows = [
        [
            f"{one.clients:,}",
            str(one.processes),
            number_text(one.seconds),
            number_text(1e3 * one.reduction),
            f"{100 * one.efficiency:.1f}",
        ]
        for one in projections
    ]
    return [header, *rows]


def csv_text(measurements: Iterable[Measurement]) -> str:
    """One line for each point, all that was measured; seconds and bytes."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Measurement)], lineterminator="\n")
    writer.writeheader()
    for group in by_processes(measurements).values():
        writer.writerows(asdict(one) for one in group)
    return text.getvalue()
