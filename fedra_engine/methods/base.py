"""The seam behind which federated algorithms differ. A method never touches devices or loops over samples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedra_engine.config import MethodConfig
from fedra_engine.federation.aggregation import Aggregator
from fedra_engine.federation.allocation import Allocation
from fedra_engine.federation.clients import Clients
from fedra_engine.models.state import GlobalState


@dataclass(frozen=True)
class Federation:
    """What a method may know.

    Attributes:
        config: the method's options.
        clients: all clients, with their capacities.
        depth: blocks of the foundation model.
        seed: seed of every draw.
    """

    config: MethodConfig
    clients: Clients
    depth: int
    seed: int


class Method(ABC):
    """A federated algorithm; subclasses say which blocks participants train."""

    def __init__(self, federation: Federation) -> None:
        self.federation = federation

    @abstractmethod
    def allocate(self, participants: NDArray[np.int64], round: int) -> Allocation:
        """Which blocks each participant trains in `round`, bool [participants, blocks]."""

    def evaluated_blocks(self) -> NDArray[np.int64]:
        """The blocks of the global model, ascending; all, unless a method's model is shallower."""
        return np.arange(self.federation.depth)

    def aggregate(self, aggregator: Aggregator) -> GlobalState:
        """The new global state from all updates of a round; by default their mean."""
        return aggregator.result()
