"""Measurements of a scaling study and the report on them: table, fits, figure, and computed times.

The computed time of a round on p equal processes is T(p) = (T(1) − R) / p + R + C(p). T(1) is the measured time of the
round on one process, and R the part of it that every process repeats for all clients (sampling, allocation, division of
the work). C(p) is the time of a ring all-reduce of the aggregator's sums, S bytes:

    C(p) = 2 (p − 1) α + 2 (p − 1) / p · S / β,

with α seconds per message and β bytes/s between two processes (Thakur, Rabenseifner and Gropp, 2005). The model assumes
that work is divided evenly, which holds as long as each process has many more clients than lanes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_type_hints

import numpy as np

from fedra_engine.callbacks.run_folder import reading
from fedra_engine.runtime.errors import count_of, shown
from fedra_engine.runtime.tables import Cells, markdown_code, markdown_table, markdown_text, number_text
from fedra_engine.studies.plan import Network, processes_text
from fedra_engine.studies.report import ReportFiles, csv_text, grouped, png

MEASUREMENT = "measurement.json"
"""File in a point's folder."""
REPORT = ReportFiles(".scaling.lock", ("scaling.csv", "scaling.md", "scaling.png"))
_EXPLANATION = """\
Every point was measured in processes of its own, after a step that is not counted. `s/round` is wall-clock time (median
of `rounds`), `busy s` CPU-seconds of all processes (on GPUs, GPU-seconds), `ms/client` the same for each client.
`server ms/client` are the CPU milliseconds of a round in which training costs nothing: sampling, allocation, drawing
samples and batches, hand-out, aggregation. `memory` is the largest resident set of a process. `up` and `down` are
counted, not measured: what all clients exchange with the server in a round (`fedra_engine/costs/model.py`)."""
_MAY_BE_ZERO = ("gpu_memory", "server_seconds", "repeated_seconds", "uploaded", "downloaded", "reduced")
_FITTED_FROM = 100
"""Fewest clients of a point that is fitted: with fewer, a round is over before the lanes are full."""


@dataclass(frozen=True)
class Measurement:
    """Measured and counted costs of a round in which all clients train.

    Attributes:
        threads: of each process.
        device: `cpu`, or the GPU's name.
        lanes: clients that each process trains at the same time.
        steps: local steps of all clients.
        seconds: wall-clock time of a round, median over the measured `rounds`.
        busy_seconds: CPU-seconds of a round over all processes, mean over the rounds; on GPUs, the wall-clock time
            multiplied by their number.
        server_seconds: CPU-seconds, over all processes, of a round without training.
        repeated_seconds: CPU-seconds of the work that every process repeats: sampling, allocation, division.
        memory: largest resident set of a process, in bytes.
        gpu_memory: most bytes allocated on a GPU; 0 on a CPU.
        uploaded: bytes from all clients to the server in a round, counted.
        downloaded: bytes from the server to all clients, counted.
        reduced: bytes of the sums that processes merge in a round.
    """

    clients: int
    processes: int
    threads: int
    device: str
    lanes: int
    steps: int
    rounds: int
    seconds: float
    busy_seconds: float
    server_seconds: float
    repeated_seconds: float
    memory: int
    gpu_memory: int
    uploaded: float
    downloaded: float
    reduced: int

    @classmethod
    def read(cls, file: Path) -> Measurement:
        """Read a measurement from a JSON file; InputError if it holds something else."""
        with reading(file, "a measurement of this version, or no such file"):
            measurement = cls(**json.loads(file.read_text()))
            for name, kind in get_type_hints(cls).items():
                value, least = getattr(measurement, name), 0 if name in _MAY_BE_ZERO else 1e-9
                if not isinstance(value, (int, float) if kind is float else kind):
                    raise ValueError(f"{name} {shown(value)}")
                if not isinstance(value, str) and not least <= value < math.inf:
                    raise ValueError(f"{name} {shown(value)}")
        return measurement


_COLUMNS: dict[str, Callable[[Measurement], str]] = {
    "clients": lambda one: f"{one.clients:,}",
    "processes": lambda one: str(one.processes),
    "s/round": lambda one: number_text(one.seconds),
    "busy s": lambda one: number_text(one.busy_seconds),
    "clients/s": lambda one: number_text(one.clients / one.seconds),
    "ms/client": lambda one: number_text(1e3 * one.busy_seconds / one.clients),
    "server ms/client": lambda one: f"{1e3 * one.server_seconds / one.clients:.3f}",
    "memory (MiB)": lambda one: f"{one.memory / 2**20:,.0f}",
    "GPU (MiB)": lambda one: f"{one.gpu_memory / 2**20:,.0f}" if one.gpu_memory else "–",
    "up (MB)": lambda one: number_text(one.uploaded / 1e6),
    "down (MB)": lambda one: number_text(one.downloaded / 1e6),
    "rounds": lambda one: str(one.rounds),
}
"""Columns of the table, with a function that gives a measurement's cell."""


def write_report(folder: Path, command: str, measurements: Sequence[Measurement], projection: str | None) -> Cells:
    """Write scaling.csv, scaling.md and scaling.png into `folder`, and return the table.

    Args:
        command: the command that was typed.
        measurements: at least one, by rising numbers of processes and clients.
        projection: the section of computed times, if there are any.
    """
    devices = markdown_text(" and ".join(sorted({one.device for one in measurements})))
    rows, threads, lanes = cells(measurements), measurements[0].threads, {one.lanes for one in measurements}
    all_lanes = f"{min(lanes)}–{max(lanes)}" if len(lanes) > 1 else str(min(lanes))
    parts = [
        "# Scaling",
        markdown_code(command),
        f"Device: {devices}; {count_of(threads, 'thread')} per process; {all_lanes} lanes.",
        _EXPLANATION,
        markdown_table(rows).rstrip(),
        *fit_texts(measurements),
        "![scaling](scaling.png)",
        *([projection] if projection else []),
    ]
    table = csv_text([asdict(one) for one in measurements])
    REPORT.write(folder, table, "\n\n".join(parts) + "\n", png(_figure(measurements)))
    return rows


def cells(measurements: Iterable[Measurement]) -> Cells:
    """The table: one row for each point."""
    return [[*_COLUMNS], *([text(one) for text in _COLUMNS.values()] for one in measurements)]


def fitted_exponent(
    measurements: Sequence[Measurement], of: Literal["seconds", "busy_seconds"] = "seconds"
) -> float | None:
    """Exponent k of the fit time = c · clientsᵏ by least squares on logarithms.

    Only points of `_FITTED_FROM` clients or more count; None with fewer than two of them.
    """
    large = [one for one in measurements if one.clients >= _FITTED_FROM]
    if len(large) < 2:
        return None
    slope, _ = np.polyfit(np.log([one.clients for one in large]), np.log([getattr(one, of) for one in large]), 1)
    return float(slope)


def fit_texts(measurements: Sequence[Measurement]) -> list[str]:
    """One sentence for each number of processes: the fitted exponents and the growth of memory."""
    texts = []
    for processes, group in grouped(measurements, "processes").items():
        power, busy = fitted_exponent(group), fitted_exponent(group, "busy_seconds")
        if power is not None and busy is not None:
            few, *_, many = (one for one in group if one.clients >= _FITTED_FROM)
            texts.append(
                f"{processes_text(processes)}: seconds per round grow with clients to the power of {power:.3f} from "
                f"{few.clients:,} to {many.clients:,} clients, busy seconds to that of {busy:.3f}; memory with "
                f"{many.clients:,} is {many.memory / few.memory:.3f} times that with {few.clients:,}."
            )
    return texts


def _figure(measurements: Sequence[Measurement]) -> Any:
    """Plot seconds, memory and server work over the number of clients; one line for each number of processes."""
    # Imported late: processes that measure their memory import this module, too.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), dpi=150, layout="constrained")
    seconds, memory, server = figure.subplots(1, 3)
    for processes, group in grouped(measurements, "processes").items():
        clients, name, power = [one.clients for one in group], processes_text(processes), fitted_exponent(group)
        label = name if power is None else f"{name}, exponent {power:.3f}"
        seconds.loglog(clients, [one.seconds for one in group], "o-", label=label)
        memory.semilogx(clients, [one.memory / 2**20 for one in group], "o-", label=name)
        server.loglog(clients, [1e3 * one.server_seconds / one.clients for one in group], "o-", label=name)
    # Cut off above zero, a few per cent would look like growth.
    memory.set_ylim(0, 1.2 * max(one.memory for one in measurements) / 2**20)
    for axes, title in (
        (seconds, "seconds per round"),
        (memory, "peak memory of a process (MiB)"),
        (server, "server work (ms per client)"),
    ):
        axes.set(xlabel="clients in a round", ylabel=title)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    return figure


def projected_seconds(measured: Measurement, processes: int, network: Network) -> tuple[float, float]:
    """Compute T(p) and C(p) for `processes` processes from a round that was `measured` on one."""
    reduction = 2 * (processes - 1) * (network.latency + measured.reduced / processes / network.bandwidth)
    repeated = min(measured.repeated_seconds, measured.seconds)
    return (measured.seconds - repeated) / processes + repeated + reduction, reduction


def projection_text(measurements: Sequence[Measurement], processes: Sequence[int], network: Network) -> str | None:
    """The section of computed times, for the largest round measured on one process; None if there is none."""
    alone = grouped(measurements, "processes").get(1)
    if not alone:
        return None
    largest = alone[-1]
    rows = [["clients", "processes", "s/round (computed)", "of it reduction (ms)", "efficiency (%)"]]
    for count in processes:
        seconds, reduction = projected_seconds(largest, count, network)
        efficiency = f"{100 * largest.seconds / (count * seconds):.1f}"
        times = [number_text(seconds), number_text(1e3 * reduction)]
        rows.append([f"{largest.clients:,}", str(count), *times, efficiency])
    return (
        "## More processes: computed, not measured\n\n"
        f"From the measured round of {largest.clients:,} clients on one process ({largest.device}), of which "
        f"{largest.repeated_seconds:.3g} s are repeated by every process, and a ring all-reduce of "
        f"{largest.reduced / 1e6:.3g} MB with α = {network.latency:g} s per message and "
        f"β = {network.bandwidth / 1e9:g} GB/s (`fedra_engine/studies/measurements.py` has the model). Nothing "
        "but the round on one process ran. The model knows nothing of caches and memory that processes on one "
        f"machine share, so compare it with what was measured.\n\n{markdown_table(rows).rstrip()}"
    )
