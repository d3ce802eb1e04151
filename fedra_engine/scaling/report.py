"""The files that a scaling study leaves in its folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock

from fedra_engine.runtime.files import check_own, whole_file, write_whole
from fedra_engine.runtime.tables import markdown_code, markdown_table, markdown_text
from fedra_engine.scaling.figures import plot_scaling
from fedra_engine.scaling.measurement import Measurement
from fedra_engine.scaling.plan import Network
from fedra_engine.scaling.projection import project
from fedra_engine.scaling.tables import (
    FITTED_FROM,
    by_processes,
    cells,
    csv_text,
    fitted_exponent,
    projection_cells,
)

_EXPLANATION = """\
Every point was measured in processes of its own, after a step that is not counted. `s/round` is wall-clock time (median
of `rounds`), `busy s` CPU-seconds of all processes (on GPUs, GPU-seconds), `ms/client` the same for each client.
`server ms/client` are the CPU milliseconds of a round in which training costs nothing: sampling, allocation, drawing
samples and batches, hand-out, aggregation. `memory` is the largest resident set of a process. `up` and `down` are
counted, not measured: what all clients exchange with the server in a round (`fedra_engine/costs/memory_model.py`)."""

_LOCK = ".scaling.lock"


def write_report(folder: Path, command: str, measurements: Sequence[Measurement], projection: str | None) -> None:
    """Write scaling.csv, scaling.md and scaling.png.

    Args:
        folder: where to.
        command: that made the measurements.
        measurements: at least one.
        projection: a section of computed times, if there are any.
    """
    devices = markdown_text(" and ".join(sorted({one.device for one in measurements})))
    threads = measurements[0].threads
    parts = [
        "# Scaling",
        markdown_code(command),
        f"Device: {devices}; {threads} thread{'s' if threads > 1 else ''} per process; {_lanes(measurements)} lanes.",
        _EXPLANATION,
        markdown_table(cells(measurements)).rstrip(),
        *fit_texts(measurements),
        "![scaling](scaling.png)",
        *([projection] if projection else []),
    ]
    # Another command may be writing the report of another part of the points.
    table, page, plot = _files(folder)
    with FileLock(folder / _LOCK):
        write_whole(table, csv_text(measurements))
        write_whole(page, "\n\n".join(parts) + "\n")
        with whole_file(plot) as temporary:
            plot_scaling(measurements, temporary)


def check_report(folder: Path) -> None:
    """Raises InputError if a report would replace files that no study wrote."""
    check_own(_files(folder), folder / _LOCK)


def fit_texts(measurements: Sequence[Measurement]) -> list[str]:
    """The fitted exponents and how memory grew, a sentence for each number of processes."""
    texts = []
    for processes, group in by_processes(measurements).items():
        power, busy = fitted_exponent(group), fitted_exponent(group, "busy_seconds")
        if power is None or busy is None:
            continue
        few, *_, many = (one for one in group if one.clients >= FITTED_FROM)
        texts.append(
            f"{processes} process{'es' if processes > 1 else ''}: seconds per round grow with clients to the power of "
            f"{power:.3f} from {few.clients:,} to {many.clients:,} clients, busy seconds to that of {busy:.3f}; memory "
            f"with {many.clients:,} is {many.memory / few.memory:.3f} times that with {few.clients:,}."
        )
    return texts


def projection_text(measurements: Sequence[Measurement], processes: Sequence[int], network: Network) -> str | None:
    """The computed times of the largest round that one process was measured on; None if it was on none."""
    alone = by_processes(measurements).get(1)
    if not alone:
        return None
    table = markdown_table(projection_cells(project(alone[-1], processes, network))).rstrip()
    return "\n\n".join(
        [
            "## More processes: computed, not measured",
            f"From the measured round of {alone[-1].clients:,} clients on one process ({alone[-1].device}), of which "
            f"{alone[-1].repeated_seconds:.3g} s are repeated by every process, and a ring all-reduce of "
            f"{alone[-1].reduced / 1e6:.3g} MB with α = {network.latency:g} s per message and "
            f"β = {network.bandwidth / 1e9:g} GB/s (`fedra_engine/scaling/projection.py` has the model). Nothing "
            "but the round on one process ran. The model knows nothing of caches and memory that processes on one "
            "machine share, so compare it with what was measured.",
            table,
        ]
    )


def _files(folder: Path) -> list[Path]:
    return [folder / name for name in ("scaling.csv", "scaling.md", "scaling.png")]


def _lanes(measurements: Sequence[Measurement]) -> str:
    lanes = {one.lanes for one in measurements}
    return f"{min(lanes)}–{max(lanes)}" if len(lanes) > 1 else str(lanes.pop())
