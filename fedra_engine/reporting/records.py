"""What is counted and remembered of a round."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from fedra_engine.federation.work import ClientUpdates


@dataclass
class Tally:
    """What was trained so far in a round.

    Attributes:
        clients: how many have trained.
        samples: how many samples they went through, over all local steps.
        loss: the sum of the losses over these; float64 [], on the executor's device.
    """

    clients: int = 0
    samples: int = 0
    loss: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))

    def mean_loss(self) -> float | None:
        """Per sample, None when nobody trained; waits for the executor's device."""
        return float(self.loss) / self.samples if self.samples else None

    def add(self, updates: ClientUpdates) -> None:
        """Count the updates of a few clients."""
        self.clients += len(updates.clients)
        self.samples += int(updates.processed.sum())
        self.loss = self.loss + updates.losses.sum()


@dataclass
class RoundMetrics:
    """What `metrics.jsonl` remembers of a round.

    Attributes:
        round: its number, from 0.
        participants: clients that trained.
        samples: samples they went through, over all local steps.
        loss: mean training loss over these; None when nobody trained.
        lr: learning rate.
        blocks_held: blocks that somebody held.
        seconds: wall-clock time.
        accuracy: per domain, where the state after the round was evaluated.
        simulated_seconds, late, dropped: what clients' devices made of the round, where they have any; see
            `DeviceRound`.
    """

    round: int
    participants: int
    samples: int
    loss: float | None
    lr: float
    blocks_held: int
    seconds: float
    accuracy: dict[str, float] | None = None
    simulated_seconds: float | None = None
    late: int | None = None
    dropped: int | None = None

    def record(self) -> dict[str, Any]:
        """The values by name; what was not measured is left out."""
        optional = {each.name for each in fields(self) if each.default is None}
        return {name: value for name, value in asdict(self).items() if name not in optional or value is not None}
