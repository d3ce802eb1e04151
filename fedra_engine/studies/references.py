"""What tuning is compared with: the frozen model, and the ridge probe on its features; one of each for every seed."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from accelerate import Accelerator

from fedra_engine.callbacks.run_folder import make_folder, reading
from fedra_engine.config import ClientsConfig, ExperimentConfig
from fedra_engine.execution.evaluation import accuracies
from fedra_engine.experiment import Experiment, build_experiment
from fedra_engine.models.state import EvaluatedModel
from fedra_engine.runtime.errors import InputError
from fedra_engine.runtime.files import content_hash, write_whole
from fedra_engine.studies.outcomes import test_counts
from fedra_engine.studies.probe import ridge_probe

FROZEN, PROBE = "frozen", "ridge probe"
"""Names in tables."""


@dataclass(frozen=True)
class References:
    """Accuracies, from 0 to 1, by domain.

    Attributes:
        seed: of the experiment.
        frozen: of the whole model before tuning, with its untrained classifier.
        probe: of the ridge probe; None for causal language models.
        tests: test samples by domain; None for causal language models, whose texts have many predictions each.
    """

    seed: int
    frozen: dict[str, float]
    probe: dict[str, float] | None
    tests: dict[str, int] | None

    @classmethod
    def of(cls, experiment: Experiment) -> References:
        """Evaluate the frozen model, and fit and evaluate the probe."""
        everything, tests = EvaluatedModel(np.arange(experiment.foundation.depth)), test_counts(experiment)
        frozen = accuracies(experiment.evaluator.scores(experiment.initial_state, everything))
        probe = None if tests is None else ridge_probe(experiment).accuracy
        return cls(experiment.config.seed, frozen, probe, tests)


class PlannedReferences(NamedTuple):
    """References to measure, or to read from `folder`: those of the data and the model of `config`."""

    config: ExperimentConfig
    folder: Path

    @property
    def title(self) -> str:
        """Their name in messages."""
        return f"{FROZEN} model and {PROBE} of seed {self.config.seed}"

    @property
    def file(self) -> Path:
        """Named after the seed and all that they depend on."""
        setting = json.dumps([asdict(self.config.data), asdict(self.config.model)], sort_keys=True)
        return self.folder / f"seed{self.config.seed}-{content_hash(setting.encode()).hexdigest()[:8]}.json"


class Measured(NamedTuple):
    """References, or what keeps them from being measured."""

    plan: PlannedReferences
    found: References | None
    note: str = ""


def measure(plan: PlannedReferences) -> Measured:
    """Read references from their file, or else measure them and write it; bad input gives a note in their place."""
    try:
        if not plan.file.is_file():
            wanted = plan.config
            # One client a domain, of any capacity: the method and the clients do not matter.
            config = ExperimentConfig(seed=wanted.seed, data=wanted.data, model=wanted.model, lora=wanted.lora)
            config.clients = ClientsConfig([1])
            references = References.of(build_experiment(config, Accelerator().device))
            make_folder(plan.folder)
            write_whole(plan.file, json.dumps(asdict(references), indent=2) + "\n")
        with reading(plan.file, "the file as it was written (it may be removed)"):
            return Measured(plan, References(**json.loads(plan.file.read_text())))
    except InputError as error:
        return Measured(plan, None, str(error))
