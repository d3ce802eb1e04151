"""The record of a round: what was returned, whether it can be used, and the metrics that `metrics.jsonl` keeps."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedra_engine.federation.allocation import Allocation
from fedra_engine.federation.averages import finite_values
from fedra_engine.federation.updates import ClientUpdates
from fedra_engine.federation.work import LocalWork
from fedra_engine.runtime.errors import InputError, count_of

_LOG = logging.getLogger(__name__)
MOST_RECORDED = 100
"""Most clients with bad updates that `metrics.jsonl` names in a round."""
MOST_ALLOCATED = 1000
"""Most participants of a round whose blocks `metrics.jsonl` lists one by one."""
_SUSPICIOUS = 10.0
"""An update whose norm is more than this many times the round's median is suspicious."""
_ENOUGH_TO_COMPARE = 4


class ReturnedUpdates(NamedTuple):
    """A round's updates in numbers; all arrays are [clients].

    Attributes:
        clients: int64 client indices.
        processed: int64, samples that each client trained on, over all local steps.
        norms: float64; see `ClientUpdates.norms`.
    """

    clients: NDArray[np.int64]
    processed: NDArray[np.int64]
    norms: NDArray[np.float64]

    @classmethod
    def merged(cls, parts: Sequence[ReturnedUpdates]) -> ReturnedUpdates:
        """Join the `parts` of all processes, in ascending order of clients."""
        clients, processed, norms = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        order = np.argsort(clients)
        return cls(clients[order], processed[order], norms[order])

    @property
    def good(self) -> NDArray[np.bool_]:
        """bool [clients], whether the client's update is finite."""
        return np.isfinite(self.norms)

    @property
    def samples(self) -> int:
        """Samples that the clients with finite updates trained on."""
        return int(self.processed[self.good].sum())

    def suspicious(self) -> tuple[NDArray[np.int64], float]:
        """Clients whose finite update is far larger than the median norm, and that median."""
        norms = self.norms[self.good]
        median = float(np.median(norms)) if len(norms) >= _ENOUGH_TO_COMPARE else 0.0
        # With a median of 0 any update at all would be suspicious.
        far = (self.norms > _SUSPICIOUS * median) & self.good & (median > 0)
        return self.clients[far], median


@dataclass
class Tally:
    """A running count of a round's training, bad updates included.

    Attributes:
        clients: number of clients that have trained.
        samples: samples that they trained on, over all local steps.
        loss: float64 scalar on the executor's device, the loss summed over these samples.
    """

    clients: int = 0
    samples: int = 0
    loss: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64), repr=False)
    _returned: list[tuple[NDArray[np.int64], NDArray[np.int64], Tensor]] = field(default_factory=list, repr=False)

    def mean_loss(self) -> float | None:
        """Mean loss of a sample, None when nobody trained; waits for the executor's device."""
        return float(self.loss) / self.samples if self.samples else None

    def add(self, updates: ClientUpdates) -> None:
        """Count `updates`."""
        self.clients += len(updates.clients)
        self.samples += int(updates.processed.sum())
        self.loss = self.loss + updates.losses.sum()
        assert updates.norms is not None
        self._returned.append((updates.clients, updates.processed, updates.norms))

    def returned(self) -> ReturnedUpdates:
        """All updates that were counted; waits for the executor's device once."""
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
    """Return the clients whose updates are not finite; warn of them, and of far larger updates than the median.

    Args:
        returned: the updates of all processes.
        round: the round, from 0.
        on_bad_update: `training.on_bad_update`.
        names_of: describes clients in messages.
        warn: whether this process writes the job's warnings.

    Raises:
        InputError: all updates are bad, or one is bad and none may be dropped.
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
    """Raise InputError unless all `tensors` of the new global state are finite."""
    if all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        return
    raise InputError(
        f"training.lr: found a global state that is not finite after round {work.round + 1} with a rate of "
        f"{work.lr:g}, though the updates were; expected training to stay finite (lower training.lr, clip_norm or "
        "server.lr). The rounds before are kept"
    )


@dataclass
class RoundMetrics:
    """A round's record in `metrics.jsonl`.

    Attributes:
        round: the round, from 0.
        participants: number of clients whose update was used.
        samples: samples that they trained on, over all local steps.
        loss: mean training loss of a sample; None when nobody trained.
        lr: learning rate.
        blocks_held: number of blocks with a holder.
        seconds: wall-clock time.
        accuracy: per domain, where the state after the round was evaluated.
        measures: the other measures of that evaluation, by name and domain (`set_measures`).
        simulated_seconds, late, dropped: see `DeviceRound`; where clients have devices.
        bad_updates: clients that were left out because their update is not finite, where there are any.
        bad_clients: the first `MOST_RECORDED` of them.
        allocation: the blocks that each participant held, by client (as text, as in JSON); of those whose update was
            used, and where they are at most `MOST_ALLOCATED`.
        trained: the blocks that each of them trained, where a method has participants train only some of theirs.
        holders: number of participants that held each block, [blocks], where they are more than `MOST_ALLOCATED`.
    """

    round: int
    participants: int
    samples: int
    loss: float | None
    lr: float
    blocks_held: int
    seconds: float
    accuracy: dict[str, float] | None = None
    measures: dict[str, dict[str, float]] | None = None
    simulated_seconds: float | None = None
    late: int | None = None
    dropped: int | None = None
    bad_updates: int | None = None
    bad_clients: list[int] | None = None
    allocation: dict[str, list[int]] | None = None
    trained: dict[str, list[int]] | None = None
    holders: list[int] | None = None

    def __repr__(self) -> str:
        return f"RoundMetrics({self.summary_line()})"

    def summary_line(self) -> str:
        """The round, from 1, how many took part, and their loss, as in `round 3: 10 participants, loss 1.234`."""
        loss = "nobody trained" if self.loss is None else f"loss {self.loss:.4g}"
        return f"round {self.round + 1}: {count_of(self.participants, 'participant')}, {loss}"

    def set_allocation(self, participants: NDArray[np.int64], held: Allocation, trained: Allocation) -> None:
        """Record who held and who trained which blocks, bool [participants, blocks] each."""
        if len(participants) > MOST_ALLOCATED:
            self.holders = held.sum(axis=0).tolist()
            return
        self.allocation = _by_client(participants, held)
        if not np.array_equal(held, trained):
            self.trained = _by_client(participants, trained)

    def set_measures(self, measures: Mapping[str, Mapping[str, float]]) -> None:
        """Record the result of an evaluation, `Evaluator.measures`: by name, `accuracy` among them, and domain."""
        named = {name: dict(of_domain) for name, of_domain in measures.items()}
        self.accuracy, self.measures = named.pop("accuracy"), named

    def record(self) -> dict[str, Any]:
        """The values by name, without optional ones that are None; measures beside the accuracy."""
        optional = {each.name for each in fields(self) if each.default is None}
        values = {name: value for name, value in asdict(self).items() if name not in optional or value is not None}
        measures = values.pop("measures", {})
        return values | {name: finite_values(of_domain) for name, of_domain in measures.items()}


RECORDED = frozenset({each.name for each in fields(RoundMetrics)} | {"test_loss", "perplexity"})
"""Names in a record that no other measure may have."""


def _by_client(participants: NDArray[np.int64], blocks: Allocation) -> dict[str, list[int]]:
    return {str(client): np.flatnonzero(row).tolist() for client, row in zip(participants, blocks, strict=True)}
