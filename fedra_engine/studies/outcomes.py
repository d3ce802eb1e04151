"""Which test samples the final model of a run predicts correctly, for paired tests."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from fedra_engine.callbacks.run_folder import OUTCOMES, reading
from fedra_engine.experiment import Experiment
from fedra_engine.models.state import GlobalState
from fedra_engine.runtime.files import content_hash, write_whole


@dataclass(frozen=True)
class SampleOutcomes:
    """How the final model of a run does on each test sample.

    Attributes:
        samples: digest of the test samples, which is equal for equal samples in the same order.
        tests: their number by domain; None where a sample has many predictions, which depend on each other (the tokens
            of a text).
        correct: by domain, a character for each sample, `1` if its prediction is correct; None without `tests`, or if
            the samples of a domain are predicted by several clients' own models.
    """

    samples: str
    tests: dict[str, int] | None
    correct: dict[str, str] | None

    @classmethod
    def of(cls, experiment: Experiment, state: GlobalState) -> SampleOutcomes:
        """Evaluate `state` as the run does it."""
        samples, method = experiment.test_samples, experiment.method
        tests = test_counts(experiment)
        if tests is None:
            return cls("", None, None)
        content = (samples.digest().encode(), samples.domains.numpy().tobytes(), samples.labels.numpy().tobytes())
        digest = content_hash(b"".join(content)).hexdigest()
        if method.personal_states(state) is not None:
            return cls(digest, tests, None)
        right = experiment.evaluator.sample_scores(state, method.evaluated_model())[:, 0].to(torch.int64)
        of_domain = (right[samples.domains == index].tolist() for index in range(len(tests)))
        return cls(digest, tests, {name: "".join(map(str, each)) for name, each in zip(tests, of_domain, strict=True)})

    @classmethod
    def read(cls, folder: Path, domains: list[str]) -> SampleOutcomes:
        """Read what `write` wrote; InputError if it is missing, damaged or of other `domains`."""
        file = folder / OUTCOMES
        with reading(file, "the file of a finished run as it was"):
            found = cls(**json.loads(file.read_text()))
            tests, correct = found.tests or {}, found.correct or {}
            domains_fit = found.tests is None or list(tests) == domains
            counts_fit = all(type(count) is int and count > 0 for count in tests.values())
            fits = correct.keys() <= tests.keys() and all(len(correct[name]) == tests[name] for name in correct)
            if not (domains_fit and counts_fit and fits) or set("".join(correct.values())) - {"0", "1"}:
                raise ValueError
        return found

    def write(self, folder: Path) -> None:
        """Write `OUTCOMES` into a run's folder."""
        write_whole(folder / OUTCOMES, json.dumps(asdict(self)) + "\n")


def test_counts(experiment: Experiment) -> dict[str, int] | None:
    """Test samples by domain; None for causal language models, whose texts have many predictions each."""
    if not experiment.foundation.task.trains_head:
        return None
    counts = experiment.test_samples.domains.bincount(minlength=len(experiment.domains))
    return dict(zip(experiment.domains, counts.tolist(), strict=True))
