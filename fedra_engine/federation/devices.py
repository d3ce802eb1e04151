"""Clients' devices: who can take part in a round, how long it takes there, and whose update arrives in time.

All draws are made for all clients at once, so that none depends on who else takes part or on the number of processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedra_engine.config import DeviceConfig
from fedra_engine.errors import InputError
from fedra_engine.randomness import generator

if TYPE_CHECKING:
    from fedra_engine.costs import ClientCosts, CostModel

GIGA = 1e9
"""FLOP/s in a GFLOP/s."""
MEGABIT = 1e6 / 8
"""Bytes in a Mbit."""
GIBIBYTE = 2**30


@dataclass(frozen=True)
class DeviceRound:
    """What became of the participants of a round on their devices.

    Attributes:
        arrived: bool [participants], whether the server gets the update in time.
        dropped: participants that broke off.
        late: others that were not done at the deadline.
        seconds: simulated time until the server can go on: that of the slowest participant that arrives, or the
            deadline if somebody else was waited for.
    """

    arrived: NDArray[np.bool_]
    dropped: int
    late: int
    seconds: float


@dataclass(frozen=True)
class Devices:
    """The device of each client.

    Attributes:
        profiles: kinds of devices.
        of_client: int64 [clients], index into `profiles`.
        seed: of the experiment.
    """

    profiles: Sequence[DeviceConfig]
    of_client: NDArray[np.int64]
    seed: int

    def available(self, round: int) -> NDArray[np.bool_]:
        """Whether each client can be asked to take part in `round`, bool [clients]."""
        chances = self._values([profile.availability for profile in self.profiles])
        return self._uniform(round, "availability") < chances

    def seconds(self, participants: NDArray[np.int64], costs: ClientCosts, round: int) -> NDArray[np.float64]:
        """Simulated time from hand-out to the arrival of the update, [participants]."""
        profiles = self.profiles
        compute = self._values([_rate(profile.compute, GIGA) for profile in profiles])[participants]
        upload = self._values([_rate(profile.upload, MEGABIT) for profile in profiles])[participants]
        download = self._values([_rate(profile.download, MEGABIT) for profile in profiles])[participants]
        spread = self._values([profile.variation for profile in profiles])[participants]
        normal = generator(self.seed, round=round, purpose="device speed").standard_normal(len(self.of_client))
        usual = costs.downloaded / download + costs.flops / compute + costs.uploaded / upload
        seconds: NDArray[np.float64] = usual * np.exp(spread * normal[participants])
        return seconds

    def simulate(
        self, participants: NDArray[np.int64], costs: ClientCosts, round: int, deadline: float | None
    ) -> DeviceRound:
        """Let the `participants` train on their devices; those that take longer than `deadline` seconds are late."""
        chances = self._values([profile.dropout for profile in self.profiles])
        dropped = (self._uniform(round, "drop-out") < chances)[participants]
        seconds = self.seconds(participants, costs, round)
        late = ~dropped & (seconds > (np.inf if deadline is None else deadline))
        arrived = ~dropped & ~late
        last = float(seconds[arrived].max(initial=0.0))
        # Without a deadline the server learns at once that a participant broke off; with one it waits for it.
        waited = last if deadline is None or arrived.all() else deadline
        return DeviceRound(arrived, int(dropped.sum()), int(late.sum()), waited)

    def capacities(self, costs: CostModel, ranks: NDArray[np.int64]) -> NDArray[np.int64]:
        """The largest number of blocks with which training fits the memory of each client's device, int64 [clients].

        Args:
            costs: what training takes.
            ranks: int64 [clients], LoRA rank of each client.

        Raises:
            InputError: some device has no room for a single block.
        """
        capacities = np.empty_like(self.of_client)
        kinds = np.stack([self.of_client, ranks])
        for index, rank in np.unique(kinds, axis=1).T.tolist():
            needed = costs.memory_by_blocks(rank)
            memory = self.profiles[index].memory
            assert memory is not None
            fitting = int(np.searchsorted(needed, memory * GIBIBYTE, side="right"))
            if fitting == 0:
                raise InputError(
                    f"clients.devices: found {memory:g} GiB of memory with clients.capacities memory, expected at "
                    f"least the {needed[0] / GIBIBYTE:.3g} GiB that training a single block takes"
                )
            capacities[(kinds[0] == index) & (kinds[1] == rank)] = fitting
        return capacities

    def _values(self, of_profile: Sequence[float]) -> NDArray[np.float64]:
        """[clients] of a value of each profile."""
        return np.array(of_profile, dtype=np.float64)[self.of_client]

    def _uniform(self, round: int, purpose: str) -> NDArray[np.float64]:
        return generator(self.seed, round=round, purpose=purpose).random(len(self.of_client))


def draw_devices(profiles: Sequence[DeviceConfig], clients: int, seed: int) -> Devices:
    """Give each client one of the `profiles`, drawn with equal chances."""
    drawn = generator(seed, purpose="devices").integers(len(profiles), size=clients)
    return Devices(profiles, drawn, seed)


def _rate(value: float | None, unit: float) -> float:
    return np.inf if value is None else value * unit
