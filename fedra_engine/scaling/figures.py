"""Seconds, memory and server work over the number of clients, which has a logarithmic axis."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from fedra_engine.scaling.measurement import Measurement
from fedra_engine.scaling.tables import by_processes, fitted_exponent


def plot_scaling(measurements: Sequence[Measurement], file: Path) -> None:
    """Draw one line for each number of processes."""
    figure = Figure(figsize=(13, 4), dpi=150, layout="constrained")
    seconds, memory, server = figure.subplots(1, 3)
    for processes, group in by_processes(measurements).items():
        clients = [one.clients for one in group]
        name = f"{processes} process{'es' if processes > 1 else ''}"
        power = fitted_exponent(group)
        seconds.loglog(
            clients,
            [one.seconds for one in group],
            "o-",
            label=name if power is None else f"{name}, exponent {power:.3f}",
        )
        memory.semilogx(clients, [one.memory / 2**20 for one in group], "o-", label=name)
        server.loglog(clients, [1e3 * one.server_seconds / one.clients for one in group], "o-", label=name)
    # From zero, or a few per cent would look like growth.
    memory.set_ylim(0, 1.2 * max(one.memory for one in measurements) / 2**20)
    for axes, title in (
        (seconds, "seconds per round"),
        (memory, "peak memory of a process (MiB)"),
        (server, "server work (ms per client)"),
    ):
        axes.set(xlabel="clients in a round", ylabel=title)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(file, format="png")
