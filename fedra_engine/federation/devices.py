"""Clients' devices: which one each client has, and who can take part in a round.

All draws are made for all clients at once, so that none depends on who else takes part or on the number of processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedra_engine.config import DeviceConfig
from fedra_engine.runtime.randomness import generator


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
        chances = self.values([profile.availability for profile in self.profiles])
        return self.uniform(round, "availability") < chances

    def values(self, of_profile: Sequence[float]) -> NDArray[np.float64]:
        """What each client has of a value of each profile, [clients]."""
        return np.array(of_profile, dtype=np.float64)[self.of_client]

    def uniform(self, round: int, purpose: str) -> NDArray[np.float64]:
        """A number from 0 to 1 drawn for each client in `round`, [clients]."""
        return generator(self.seed, round=round, purpose=purpose).random(len(self.of_client))


def draw_devices(profiles: Sequence[DeviceConfig], clients: int, seed: int) -> Devices:
    """Give each client one of the `profiles`, drawn with equal chances."""
    drawn = generator(seed, purpose="devices").integers(len(profiles), size=clients)
    return Devices(profiles, drawn, seed)
