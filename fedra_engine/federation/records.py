"""The record of a round: what was returned, whether it can be used, and the metrics that `metrics.jsonl` keeps."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedra_engine.federation.updates import ClientUpdates
from fedra_engine.federation.work import LocalWork
from fedra_engine.runtime.errors import InputError

_LOG = logging.getLogger(__name__)
MOST_RECORDED = 100
"""Most clients with bad updates that `metrics.jsonl` names in a round."""
_SUSPICIOUS = 10.0
"""An update whose norm is more than this many times the round's median is suspicious."""
_ENOUGH_TO_COMPARE = 4


class ReturnedUpdates(NamedTuple):
    """The updates of a round's clients; all arrays are [clients].

    Attributes:
        clients: int64, ascending where they are those of all processes.
        processed: int64, samples each went through.
        norms: float64; see `ClientUpdates.norms`.
    """

    clients: NDArray[np.int64]
    processed: NDArray[np.int64]
    norms: NDArray[np.float64]

    @classmethod
    def merged(cls, parts: Sequence[ReturnedUpdates]) -> ReturnedUpdates:
        """Those of all `parts`, in the order of the clients."""
        clients, processed, norms = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        order = np.argsort(clients)
        return cls(clients[order], processed[order], norms[order])

    @property
    def good(self) -> NDArray[np.bool_]:
        """bool [clients], whose update is finite."""
        return np.isfinite(self.norms)

    @property
    def samples(self) -> int:
        """How many the clients with good updates went through."""
        return int(self.processed[self.good].sum())

    def suspicious(self) -> tuple[NDArray[np.int64], float]:
        """Clients with a good update far larger than most of the round's, and the median of the norms."""
        norms = self.norms[self.good]
        median = float(np.median(norms)) if len(norms) >= _ENOUGH_TO_COMPARE else 0.0
        # Where most updates change nothing, any change at all would be infinitely many times as large.
        far = (self.norms > _SUSPICIOUS * median) & self.good & (median > 0)
        return self.clients[far], median


@dataclass
class Tally:
    """What was trained so far in a round, bad updates included.

    Attributes:
        clients: how many have trained.
        samples: how many samples they went through, over all local steps.
        loss: the sum of the losses over these; float64 [], on the executor's device.
    """

    clients: int = 0
    samples: int = 0
    loss: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    _returned: list[tuple[NDArray[np.int64], NDArray[np.int64], Tensor]] = field(default_factory=list, repr=False)

    def mean_loss(self) -> float | None:
        """Per sample, None when nobody trained; waits for the executor's device."""
        return float(self.loss) / self.samples if self.samples else None

    def add(self, updates: ClientUpdates) -> None:
        """Count the updates of a few clients."""
        self.clients += len(updates.clients)
        self.samples += int(updates.processed.sum())
        self.loss = self.loss + updates.losses.sum()
        assert updates.norms is not None
        self._returned.append((updates.clients, updates.processed, updates.norms))

    def returned(self) -> ReturnedUpdates:
        """Who returned what; waits for the executor's device, once for all."""
        nobody = np.empty(0, dtype=np.int64)
        parts = [(nobody, nobody, self.loss.new_empty(0)), *self._returned]
        clients, processed, norms = zip(*parts, strict=True)
        return ReturnedUpdates(np.concatenate(clients), np.concatenate(processed), torch.cat(norms).cpu().numpy())


def check_updates(
    returned: ReturnedUpdates,
    round: int,
    on_bad_update: Literal["drop", "error"],
    names_of: Callable[[NDArray[np.int64]], str],
    *,
    warn: bool = True,
) -> NDArray[np.int64]:
    """The clients whose updates are bad; warns of them, and of updates that are far larger than the others.

    Args:
        returned: the round's updates, on all processes.
        round: its number, from 0.
        on_bad_update: what `training.on_bad_update` asks for.
        names_of: clients in words.
        warn: whether this process speaks for the job.

    Raises:
        InputError: all updates are bad, or one is and none may be dropped.
    """
    bad, (far, median) = returned.clients[~returned.good], returned.suspicious()
    if len(bad) and (on_bad_update == "error" or len(bad) == len(returned.clients)):
        expected = "a finite one" if on_bad_update == "drop" else "finite ones, or training.on_bad_update drop"
        raise InputError(
            f"training.on_bad_update: found a loss, gradients or parameters that are not finite in round {round + 1} "
            f"from {names_of(bad)}, expected {expected}. Usual causes: training.lr or clip_norm too high, model.dtype "
            "float16 or bfloat16, bad inputs or labels. The rounds before are kept"
        )
    if len(bad) and warn:
        _LOG.warning("round %d leaves out %s: a loss, gradient or parameter is not finite", round + 1, names_of(bad))
    if len(far) and warn:
        _LOG.warning(
            "round %d has updates of more than %g times the median norm, %.3g, from %s",
            *(round + 1, _SUSPICIOUS, median, names_of(far)),
        )
    return bad


def check_finite(work: LocalWork, *tensors: Tensor) -> None:
    """Raises InputError unless what was made of the good updates of a round is finite."""
    if all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        return
    raise InputError(
        f"training.lr: found a global state that is not finite after round {work.round + 1} with a rate of "
        f"{work.lr:g}, though the updates were; expected training to stay finite (lower training.lr, clip_norm or "
        "server.lr). The rounds before are kept"
    )


@dataclass
class RoundMetrics:
    """What `metrics.jsonl` remembers of a round.

    Attributes:
        round: its number, from 0.
        participants: clients that trained, without those of `bad_updates`.
        samples: samples they went through, over all local steps.
        loss: mean training loss over these; None when nobody trained.
        lr: learning rate.
        blocks_held: blocks that somebody held.
        seconds: wall-clock time.
        accuracy: per domain, where the state after the round was evaluated.
        simulated_seconds, late, dropped: see `DeviceRound`; where clients have devices.
        bad_updates: clients that were left out because their update is not finite, where there are any.
        bad_clients: the first `MOST_RECORDED` of them.
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
    bad_updates: int | None = None
    bad_clients: list[int] | None = None

    def record(self) -> dict[str, Any]:
        """The values by name; what was not measured is left out."""
        optional = {each.name for each in fields(self) if each.default is None}
        return {name: value for name, value in asdict(self).items() if name not in optional or value is not None}
