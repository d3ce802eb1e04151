"""Results of finished runs, read from their folders."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from statistics import mean

from fedra_engine.callbacks.run_folder import COSTS, RunFolder, reading
from fedra_engine.runtime.errors import InputError
from fedra_engine.studies.outcomes import SampleOutcomes
from fedra_engine.studies.plan import PlannedRun

_WANTED = "the file of a finished run as it was"


@dataclass(frozen=True)
class RunCosts:
    """Counted costs of a run: means over rounds and participants whose updates arrive, and their FLOPs in total."""

    trainable_parameters: float
    uploaded_bytes: float
    training_flops: float


@dataclass(frozen=True)
class TrialResult:
    """The results of a finished run; accuracies are from 0 to 1.

    Attributes:
        label: name of the method in tables.
        seconds: wall-clock time of the rounds, without evaluations.
        accuracy: top-1 accuracy by domain, after the last round.
        frozen: the same before the first round.
        curve: average accuracy over the domains, by number of rounds, where it was evaluated.
        caution: the method's caution about this setting, if any.
    """

    label: str
    seed: int
    rounds: int
    seconds: float
    accuracy: dict[str, float]
    frozen: dict[str, float]
    curve: dict[int, float]
    caution: str | None

    @property
    def average(self) -> float:
        """Average accuracy over the domains, after the last round."""
        return mean(self.accuracy.values())


@dataclass(frozen=True)
class RunResult(TrialResult):
    """The results of a run that is reported, with its costs and what it predicts."""

    costs: RunCosts
    outcomes: SampleOutcomes


def read_result(run: PlannedRun) -> RunResult:
    """Read the results of a finished run from its folder; InputError if a file is missing or damaged."""
    trained, costs_file = read_trial(run), run.path / COSTS
    with reading(costs_file, _WANTED):
        costs = RunCosts(**{name: _amount(value) for name, value in json.loads(costs_file.read_text()).items()})
    return RunResult(**vars(trained), costs=costs, outcomes=SampleOutcomes.read(run.path, list(trained.accuracy)))


def read_trial(run: PlannedRun) -> TrialResult:
    """Read the results of a finished run that its summary and metrics have; InputError if these are damaged."""
    folder = RunFolder.open(run.path)
    with reading(folder.summary_file, _WANTED):
        summary = json.loads(folder.summary_file.read_text())
        rounds, frozen_average, caution = summary["rounds"], float(summary["average_frozen"]), summary.get("caution")
        accuracy, frozen = _accuracy(summary["tuned"]), _accuracy(summary["frozen"])
        if type(rounds) is not int or not isinstance(caution, str | None) or list(accuracy) != list(frozen):
            raise TypeError
    with reading(folder.metrics_file, _WANTED):
        records = folder.read_metrics()
        if [record["round"] for record in records] != list(range(rounds)):
            raise ValueError
        evaluated = {
            record["round"] + 1: mean(_accuracy(record["accuracy"]).values())
            for record in records
            if "accuracy" in record
        }
        seconds = sum(_amount(record["seconds"]) for record in records)
        kept = folder.kept_metrics_file
        if kept.is_file() and kept.read_bytes() != folder.metrics_file.read_bytes():
            raise InputError(f"{folder.metrics_file}: found other records than in {kept}, expected the same in both")
    with reading(folder.summary_file, _WANTED):
        if _accuracy(records[-1]["accuracy"]) != accuracy or not math.isclose(frozen_average, mean(frozen.values())):
            raise ValueError
    curve = {0: frozen_average, **evaluated}
    return TrialResult(run.label, run.config.seed, rounds, seconds, accuracy, frozen, curve, caution)


def _accuracy(values: dict[str, float]) -> dict[str, float]:
    """Check that accuracies, by domain, are from 0 to 1."""
    checked = {str(domain): float(value) for domain, value in values.items()}
    if not checked or not all(0 <= value <= 1 for value in checked.values()):
        raise ValueError
    return checked


def _amount(value: float) -> float:
    """Check that a value is finite and not negative."""
    if type(value) not in (int, float) or not 0 <= value < math.inf:
        raise ValueError
    return float(value)
