"""Simulated devices: time and drop-out in a round, and the capacity that a device's memory allows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedra_engine.costs.model import ClientCosts, CostModel
from fedra_engine.federation.clients import Devices
from fedra_engine.runtime.errors import InputError
from fedra_engine.runtime.randomness import generator

GIBIBYTE = 2**30


@dataclass(frozen=True)
class DeviceRound:
    """The outcome of a round on the participants' devices.

    Attributes:
        arrived: bool [participants], whether the update reached the server in time.
        dropped: number of participants that dropped out.
        late: number of others that missed the deadline.
        seconds: simulated time until the server can go on: that of the slowest update to arrive, or the deadline if
            the server waited for others.
    """

    arrived: NDArray[np.bool_]
    dropped: int
    late: int
    seconds: float


def simulate_round(
    devices: Devices, participants: NDArray[np.int64], costs: ClientCosts, round: int, deadline: float | None
) -> DeviceRound:
    """Simulate the `participants` of a round on their `devices`; `deadline` is in seconds."""
    dropout = devices.values([profile.dropout for profile in devices.profiles])
    dropped = (devices.uniform(round, "drop-out") < dropout)[participants]
    seconds = simulated_seconds(devices, participants, costs, round)
    late = ~dropped & (seconds > (np.inf if deadline is None else deadline))
    arrived = ~dropped & ~late
    last = float(seconds[arrived].max(initial=0.0))
    # Without a deadline the server learns at once that a participant dropped out; with one it waits until then.
    waited = last if deadline is None or arrived.all() else deadline
    return DeviceRound(arrived, int(dropped.sum()), int(late.sum()), waited)


def simulated_seconds(
    devices: Devices, participants: NDArray[np.int64], costs: ClientCosts, round: int
) -> NDArray[np.float64]:
    """Simulated seconds from hand-out to the arrival of the update, [participants]."""

    def speeds(of_profile: list[float | None], unit: float) -> NDArray[np.float64]:
        return devices.values([np.inf if value is None else value * unit for value in of_profile])[participants]

    profiles, megabit = devices.profiles, 1e6 / 8
    compute = speeds([profile.compute for profile in profiles], 1e9)
    upload = speeds([profile.upload for profile in profiles], megabit)
    download = speeds([profile.download for profile in profiles], megabit)
    spread = devices.values([profile.variation for profile in profiles])[participants]
    normal = generator(devices.seed, round=round, purpose="device speed").standard_normal(len(devices.of_client))
    usual = costs.downloaded / download + costs.flops / compute + costs.uploaded / upload
    seconds: NDArray[np.float64] = usual * np.exp(spread * normal[participants])
    return seconds


def capacities_by_memory(devices: Devices, costs: CostModel, ranks: NDArray[np.int64]) -> NDArray[np.int64]:
    """Most blocks that each client's device has memory to train at `ranks` [clients], int64 [clients].

    Raises:
        InputError: a device has no memory for a single block.
    """
    capacities = np.empty_like(devices.of_client)
    kinds = np.stack([devices.of_client, ranks])
    for index, rank in np.unique(kinds, axis=1).T.tolist():
        needed = costs.memory_by_blocks(rank)
        memory = devices.profiles[index].memory
        assert memory is not None
        fitting = int(np.searchsorted(needed, memory * GIBIBYTE, side="right"))
        if fitting == 0:
            raise InputError(
                f"clients.devices: found {memory:g} GiB of memory with clients.capacities memory, expected at "
                f"least the {needed[0] / GIBIBYTE:.3g} GiB that training a single block takes"
            )
        capacities[(kinds[0] == index) & (kinds[1] == rank)] = fitting
    return capacities
