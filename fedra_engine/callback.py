"""The hooks of a run and the records they receive. A callback may end the run, and changes nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fedra_engine.federation.averages import average
from fedra_engine.federation.records import RoundMetrics, Tally
from fedra_engine.runtime.errors import InputError, count_of
from fedra_engine.runtime.measure_text import change_text, percent

if TYPE_CHECKING:
    from fedra_engine.experiment import Experiment
    from fedra_engine.federation.assignment import Assignment
    from fedra_engine.federation.updates import ClientUpdates
    from fedra_engine.federation.work import LocalWork
    from fedra_engine.models.state import GlobalState


Measures = Mapping[str, Mapping[str, float]]
"""Values by name of the measure and domain."""


@dataclass(frozen=True)
class Stop:
    """Returned by `Callback.on_round` or `on_evaluate` to end the run; the `reason` is shown."""

    reason: str = ""


@dataclass(frozen=True)
class Update:
    """Updates of clients that finished at the same time on this process.

    Attributes:
        round: number of the round, from 0.
        participants: how many clients train in the round, on all processes.
        trained: totals of the round so far, on this process.
        updates: the clients' updates; the tensors are reused once the callback returns.
        work: what the whole round trains.
        assignment: who holds and trains which blocks in the round.
    """

    round: int
    participants: int
    trained: Tally
    updates: ClientUpdates
    work: LocalWork
    assignment: Assignment

    def __repr__(self) -> str:
        done = f"{self.trained.clients:,} of {count_of(self.participants, 'participant')} trained"
        return f"Update(round {self.round + 1}: {done}, {self.updates})"


@dataclass(frozen=True)
class Round:
    """A finished round.

    Attributes:
        metrics: the round's line in `metrics.jsonl`.
        before: the global state before the round.
        work: the participants whose updates arrive, and how they train.
        assignment: who held and trained which blocks.
        accuracy: by domain, at the latest evaluation of a trained state; empty before the first.
        lanes: number of lanes of every process.
    """

    metrics: RoundMetrics
    before: GlobalState
    work: LocalWork
    assignment: Assignment
    accuracy: Mapping[str, float] = field(default_factory=dict)
    lanes: Sequence[int] = ()

    def __repr__(self) -> str:
        return f"Round({self.metrics.summary_line()})"


@dataclass(frozen=True)
class Evaluation:
    """The result of evaluating a state.

    Attributes:
        accuracy: share of correct predictions (0 to 1) by domain.
        metrics: of the round that produced the state; None for the initial state.
        measures: all that was measured, `accuracy` among it, by name and domain (docs/measures.md); NaN where something
            is not defined.
    """

    accuracy: Mapping[str, float]
    metrics: RoundMetrics | None = None
    measures: Measures = field(default_factory=dict)

    def __repr__(self) -> str:
        when = "frozen model" if self.metrics is None else f"after round {self.metrics.round + 1}"
        return f"Evaluation({when}: average accuracy {percent(average(self.accuracy))})"


@dataclass(frozen=True)
class Outcome:
    """The results of a run; accuracies are shares of correct predictions (0 to 1) by domain.

    Attributes:
        rounds: how many were trained.
        frozen: accuracy before the first round.
        tuned: accuracy after the last round.
        exported: accuracy of the exported adapter: the global model's last exit.
        tuned_is: describes the model that has the accuracy `tuned`, if that is more than the exported adapter.
        stopped: the reason for which a callback ended the run early; None if none did.
        frozen_measures, tuned_measures: all that was measured then, as in `Evaluation`; empty where a run was loaded.
    """

    rounds: int
    frozen: Mapping[str, float]
    tuned: Mapping[str, float]
    exported: Mapping[str, float]
    tuned_is: str | None = None
    stopped: str | None = None
    frozen_measures: Measures = field(default_factory=dict)
    tuned_measures: Measures = field(default_factory=dict)

    def __repr__(self) -> str:
        change = change_text("accuracy", average(self.frozen), average(self.tuned))
        ended = "" if self.stopped is None else ", stopped early"
        return f"Outcome({count_of(self.rounds, 'round')}: average accuracy {change}{ended})"


class Callback:
    """Watches a run; override the hooks you need.

    Callbacks run on the main process, in the order in which they are given, or, with `every_process`, on all processes.
    """

    every_process: bool = False

    def on_start(self, experiment: Experiment, state: GlobalState, first_round: int) -> None:
        """Before anything is trained or evaluated; `state` is the one that round `first_round` begins with."""

    def on_update(self, experiment: Experiment, update: Update) -> None:
        """After one or several clients have finished."""

    def on_evaluate(self, experiment: Experiment, state: GlobalState, evaluation: Evaluation) -> Stop | None:
        """After `state` was evaluated: before the first round, every `evaluate_every` rounds, and after the last."""

    def on_round(self, experiment: Experiment, state: GlobalState, round: Round) -> Stop | None:
        """After a round, whose result is `state`, and after its `on_evaluate` if it was evaluated."""

    def on_end(self, experiment: Experiment, state: GlobalState, outcome: Outcome) -> None:
        """After the run; `state` is the final one."""


class Callbacks:
    """The callbacks of a run. All processes make the same calls, and learn together that a callback ends the run."""

    def __init__(self, experiment: Experiment, callbacks: Sequence[Callback] = ()) -> None:
        self._experiment = experiment
        self._here = [each for each in callbacks if experiment.processes.is_main or each.every_process]

    def update(self, update: Update) -> None:
        """Call all `on_update`. Unlike in `call`, processes need not wait for each other."""
        for callback in self._here:
            callback.on_update(self._experiment, update)

    def call(self, hook: str, state: GlobalState, fact: object) -> Stop | None:
        """Call another `hook` than `on_update`. Returns, on all processes, the first `Stop` of the main process.

        Raises:
            InputError: a callback on any process raised it, or returned something else than a `Stop` or None.
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
