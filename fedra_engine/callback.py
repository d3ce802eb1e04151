"""The hooks of a run, and what they are told: a callback watches, and changes nothing but when the run ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fedra_engine.federation.records import RoundMetrics, Tally
from fedra_engine.runtime.errors import InputError

if TYPE_CHECKING:
    from fedra_engine.experiment import Experiment
    from fedra_engine.federation.assignment import Assignment
    from fedra_engine.federation.work import ClientUpdates, LocalWork
    from fedra_engine.models.state import GlobalState


@dataclass(frozen=True)
class Stop:
    """What `Callback.on_round` or `on_evaluate` returns to end the run; `reason` is shown to people."""

    reason: str = ""


@dataclass(frozen=True)
class Update:
    """A few clients of a round have trained, on this process.

    Attributes:
        round: its number, from 0.
        participants: clients that train in it, on all processes.
        trained: what this process has trained of it so far.
        updates: what these few clients trained; its tensors are reused once the callback returns.
        work: of the whole round.
        assignment: who holds and trains what in it.
    """

    round: int
    participants: int
    trained: Tally
    updates: ClientUpdates
    work: LocalWork
    assignment: Assignment


@dataclass(frozen=True)
class Round:
    """A round is over, and evaluated where an evaluation was due.

    Attributes:
        metrics: what `metrics.jsonl` keeps of it.
        before: the global state that it began with.
        work: whose updates the server was to get.
        assignment: who held and trained what.
        accuracy: by domain, of the last evaluation of a trained state; empty before the first.
        lanes: of every process.
    """

    metrics: RoundMetrics
    before: GlobalState
    work: LocalWork
    assignment: Assignment
    accuracy: Mapping[str, float] = field(default_factory=dict)
    lanes: Sequence[int] = ()


@dataclass(frozen=True)
class Evaluation:
    """A state was evaluated.

    Attributes:
        accuracy: share of correct predictions (0 to 1) by domain.
        metrics: of the round that made the state; None of the state before the first round.
    """

    accuracy: Mapping[str, float]
    metrics: RoundMetrics | None = None


@dataclass(frozen=True)
class Outcome:
    """What a run came to; accuracies are shares (0 to 1) by domain.

    Attributes:
        rounds: that have been trained.
        frozen: accuracies before the first round.
        tuned: after the last.
        exported: of the global model alone, by its last output, as it is exported.
        tuned_is: what has the accuracies `tuned`, in words, where it is more than the exported model; else None.
        stopped: why a callback ended the run early; None if none did.
    """

    rounds: int
    frozen: Mapping[str, float]
    tuned: Mapping[str, float]
    exported: Mapping[str, float]
    tuned_is: str | None = None
    stopped: str | None = None


class Callback:
    """Watches a run; override the hooks you need.

    Callbacks run on the main process, in the order in which they are given. One that sets `every_process` runs on all
    processes of a job.
    """

    every_process: bool = False

    def on_start(self, experiment: Experiment, state: GlobalState, first_round: int) -> None:
        """Before anything is trained or evaluated; `state` is what round `first_round` begins with."""

    def on_update(self, experiment: Experiment, update: Update) -> None:
        """A few clients have trained."""

    def on_evaluate(self, experiment: Experiment, state: GlobalState, evaluation: Evaluation) -> Stop | None:
        """`state` was evaluated: before the first round, every `evaluate_every` rounds, and after the last."""

    def on_round(self, experiment: Experiment, state: GlobalState, round: Round) -> Stop | None:
        """A round left `state`. Comes after `on_evaluate`, where the round was evaluated."""

    def on_end(self, experiment: Experiment, state: GlobalState, outcome: Outcome) -> None:
        """The run is over, and `state` is what it came to."""


class Callbacks:
    """The callbacks of a run: every process calls the hooks at the same points, and learns who asked to stop."""

    def __init__(self, experiment: Experiment, callbacks: Sequence[Callback] = ()) -> None:
        """Keep those of `callbacks` that run on this process."""
        self._experiment = experiment
        main = experiment.processes.is_main
        self._here = [callback for callback in callbacks if main or callback.every_process]

    def update(self, update: Update) -> None:
        """Call `on_update` of all; processes have different numbers of updates."""
        for callback in self._here:
            callback.on_update(self._experiment, update)

    def call(self, hook: str, state: GlobalState, fact: object) -> Stop | None:
        """Call the `hook` of that name, another than `on_update`, of all.

        Returns:
            The first answer of the main process, on every process.

        Raises:
            InputError: a callback of some process raised it, or answered with something else than a `Stop`.
        """
        processes, stops = self._experiment.processes, list[Stop]()
        with processes.raise_on_all():
            for callback in self._here:
                answer = getattr(callback, hook)(self._experiment, state, fact)
                if isinstance(answer, Stop):
                    stops.append(answer)
                elif answer is not None:
                    raise InputError(
                        f"callbacks: found {answer!r} as the answer of {type(callback).__name__}, expected a Stop, or "
                        "None to go on"
                    )
        return processes.broadcast_object(stops[0] if stops else None)
