"""Round times for more processes than were measured: computed, not measured.

A round of n clients on p equal processes takes T(p) = (T(1) − R) / p + R + C(p). T(1) is the measured time of the round
on one process and R the part of it that every process does for all clients (sampling, allocation, division of the
work). C(p) is what the processes exchange: one all-reduce of the aggregator's sums, S bytes, as a ring,

    C(p) = 2 (p − 1) α + 2 (p − 1) / p · S / β,

with α seconds for a message and β bytes/s between two processes (Thakur, Rabenseifner and Gropp, 2005). Work is taken
to be divided evenly; that holds as long as each process has many more clients than lanes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedra_engine.scaling.measurement import Measurement
from fedra_engine.scaling.plan import Network


@dataclass(frozen=True)
class Projection:
    """Computed time of a round.

    Attributes:
        clients: of the round.
        processes: as many GPUs or CPUs as the measured one.
        seconds: of the round.
        reduction: seconds of it for the reduction.
        efficiency: T(1) / (p · T(p)).
    """

    clients: int
    processes: int
    seconds: float
    reduction: float
    efficiency: float


def project(measured: Measurement, processes: Sequence[int], network: Network) -> list[Projection]:
    """What a round measured on one process would take on each of these numbers of `processes`."""
    return [_project(measured, count, network) for count in processes]


def reduction_seconds(size: int, processes: int, network: Network) -> float:
    """C(p): time of a ring all-reduce of `size` bytes."""
    steps = 2 * (processes - 1)
    return steps * (network.latency + size / processes / network.bandwidth)


def _project(measured: Measurement, processes: int, network: Network) -> Projection:
    repeated = min(measured.repeated_seconds, measured.seconds)
    reduction = reduction_seconds(measured.reduced, processes, network)
    seconds = (measured.seconds - repeated) / processes + repeated + reduction
    return Projection(
        measured.clients, processes, seconds, reduction, efficiency=measured.seconds / (processes * seconds)
    )
