"""The frozen model and the ridge probe, against the model alone and scikit-learn."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sklearn.linear_model import RidgeClassifierCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from fedra_engine.config import DataConfig, ExperimentConfig
from fedra_engine.experiment import Experiment, build_experiment
from fedra_engine.studies.outcomes import SampleOutcomes
from fedra_engine.studies.references import PlannedReferences, References, measure
from tests.studies.planned import planned_run

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ExperimentConfig:
    return planned_run(tmp_path_factory.mktemp("references")).config


@pytest.fixture(scope="module")
def experiment(config: ExperimentConfig) -> Experiment:
    return build_experiment(config, CPU)


@torch.no_grad()
def head_inputs(experiment: Experiment, samples: object) -> torch.Tensor:
    """What the model itself hands to its classifier."""
    seen, model = [], experiment.foundation.model
    hook = experiment.foundation.head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(**samples.inputs(torch.arange(len(samples)), CPU, torch.float32))
    hook.remove()
    return seen[0]


def test_they_are_those_of_the_model_and_of_scikit_learn(experiment: Experiment) -> None:
    found = References.of(experiment)
    train, test = experiment.train_samples, experiment.test_samples
    features = [head_inputs(experiment, samples) for samples in (train, test)]
    penalties = [10 ** (exponent / 2) for exponent in range(-2, 11)]
    probe = make_pipeline(StandardScaler(), RidgeClassifierCV(alphas=penalties))
    probe.fit(features[0].double().numpy(), train.labels.numpy())
    predicted = {
        "probe": torch.from_numpy(probe.predict(features[1].double().numpy())),
        "frozen": experiment.foundation.head(features[1]).argmax(1),
    }
    for name, classes in predicted.items():
        right = (classes == test.labels).double()
        expected = [float(right[test.domains == index].mean()) for index in range(2)]
        assert list(getattr(found, name).values()) == pytest.approx(expected, abs=0.02)
    assert found.tests == {"clean": 60, "noisy": 60}
    assert found.seed == 0


def test_they_are_measured_once_for_the_same_data_and_model(
    config: ExperimentConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = PlannedReferences(config, tmp_path / "references")
    first = measure(plan)
    assert first.found is not None
    monkeypatch.setattr("fedra_engine.studies.references.build_experiment", None)
    assert measure(plan) == first
    # Neither the method nor its options matter.
    other = replace(config, method=replace(config.method, name="depthfl"), rounds=7)
    assert measure(plan._replace(config=other)).found == first.found
    files = {plan._replace(config=each).file for each in (config, replace(config, seed=1))}
    files.add(plan._replace(config=replace(config, data=DataConfig(validation_fraction=0.1))).file)
    assert len(files) == 3
    plan.file.write_text("{}")
    assert measure(plan).note.startswith(f"{plan.file}: found something else than was written")


def test_what_keeps_them_from_being_measured_is_told(config: ExperimentConfig, tmp_path: Path) -> None:
    nowhere = replace(config, model=replace(config.model, path=str(tmp_path / "none")))
    measured = measure(PlannedReferences(nowhere, tmp_path))
    assert measured.found is None
    assert measured.note.startswith("model.path: ")


def test_outcomes_say_of_each_sample_whether_it_is_predicted_correctly(experiment: Experiment) -> None:
    state = experiment.initial_state
    heads = torch.zeros_like(state.heads)
    experiment.foundation.head_layout.bias(heads[-1])[3] = 1.0
    found = SampleOutcomes.of(experiment, replace(state, heads=heads))
    labels, domain_of = experiment.test_samples.labels, experiment.test_samples.domains
    assert found.correct == {
        domain: "".join("01"[label == 3] for label in labels[domain_of == index].tolist())
        for index, domain in enumerate(experiment.domains)
    }
    assert found.samples == SampleOutcomes.of(experiment, state).samples
    data = replace(experiment.config.data, domains=["noisy", "clean"])
    other = build_experiment(replace(experiment.config, data=data), CPU)
    assert found.samples != SampleOutcomes.of(other, other.initial_state).samples


def test_clients_with_models_of_their_own_have_no_outcome_of_a_sample(config: ExperimentConfig) -> None:
    personal = build_experiment(replace(config, method=replace(config.method, name="fedsalora")), CPU)
    found = SampleOutcomes.of(personal, personal.initial_state)
    assert (found.tests, found.correct) == ({"clean": 60, "noisy": 60}, None)
