"""Results of all seeds of a method together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Self

from fedra_engine.comparison.runs import RunResult


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over seeds; no deviation of a single one."""

    mean: float
    std: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Of one value per seed."""
        return cls(mean(values), stdev(values) if len(values) > 1 else None)


@dataclass(frozen=True)
class MethodSummary:
    """A row of the comparison; what is not a `Spread` is the mean over seeds.

    Attributes:
        label: of the method.
        seeds: how many.
        accuracy: top-1 (0…1) of each domain.
        average: over the domains.
        frozen: the average before the first round.
        trainable_parameters, uploaded_bytes, training_flops: see `RunCosts`.
        seconds: of training a run.
        curve: the average accuracy by number of rounds, wherever all seeds were evaluated.
    """

    label: str
    seeds: int
    accuracy: dict[str, Spread]
    average: Spread
    frozen: float
    trainable_parameters: float
    uploaded_bytes: float
    training_flops: float
    seconds: float
    curve: dict[int, Spread]


def summarize(results: Iterable[RunResult]) -> list[MethodSummary]:
    """One summary for each method, in the order in which they first appear."""
    by_label: dict[str, list[RunResult]] = {}
    for result in results:
        by_label.setdefault(result.label, []).append(result)
    return [_summary(label, some) for label, some in by_label.items()]


def _summary(label: str, results: Sequence[RunResult]) -> MethodSummary:
    rounds = sorted(set.intersection(*(set(result.curve) for result in results)))
    return MethodSummary(
        label=label,
        seeds=len(results),
        accuracy={domain: Spread.of([result.accuracy[domain] for result in results]) for domain in results[0].accuracy},
        average=Spread.of([mean(result.accuracy.values()) for result in results]),
        frozen=mean(mean(result.frozen.values()) for result in results),
        trainable_parameters=mean(result.costs.trainable_parameters for result in results),
        uploaded_bytes=mean(result.costs.uploaded_bytes for result in results),
        training_flops=mean(result.costs.training_flops for result in results),
        seconds=mean(result.seconds for result in results),
        curve={round: Spread.of([result.curve[round] for result in results]) for round in rounds},
    )
