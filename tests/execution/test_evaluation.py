"""Scores are those of one sample after another; clients are shared out among processes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score
from torch import Tensor

from fedra_engine.data.samples import NOT_LEARNT
from fedra_engine.execution import evaluation
from fedra_engine.execution.evaluation import Evaluator, FisherInformation, measures
from fedra_engine.execution.metrics import Metric, Predictions, register_metric
from fedra_engine.execution.sequential import Submodel
from fedra_engine.execution.sweep_model import SweepModel
from fedra_engine.federation.assignment import Assignment
from fedra_engine.models import token_loss
from fedra_engine.models.state import EvaluatedModel
from fedra_engine.runtime.processes import Processes
from fedra_engine.runtime.randomness import generator
from fedra_engine.runtime.stages import Stage
from tests.tiny import DEPTH, VOCABULARY, TensorSamples, make_samples
from tests.tiny_federation import SGD, make_setting

COUNT = 40


def test_scores_equal_those_of_one_sample_after_another() -> None:
    setting = make_setting("vit", SGD)
    foundation, lora, state = setting.foundation, setting.lora, setting.state()
    samples = make_samples("vit", 50)
    model = SweepModel(foundation, lambda n: samples.inputs(torch.arange(n), torch.device("cpu"), torch.float64))
    found = FisherInformation(foundation, model, samples, seed=1)(state, COUNT, 4)

    whole = Assignment(np.ones((1, DEPTH), dtype=np.bool_))
    submodel = Submodel(foundation, lora, whole, 0, 0, state)
    layers = [[f["default"].weight for layer in b for f in (layer.lora_A, layer.lora_B)] for b in submodel.layers]
    squares = [[torch.zeros_like(factor) for factor in block] for block in layers]
    for row in generator(1, round=4, purpose="fisher").choice(50, COUNT, replace=False):
        (logits,) = submodel.logits(samples.inputs(torch.tensor([row]), torch.device("cpu"), torch.float64))
        gradients = torch.autograd.grad(logits[0, samples.labels[row]], [f for block in layers for f in block])
        for total, gradient in zip((s for block in squares for s in block), gradients, strict=True):
            total += gradient**2 / COUNT
    expected = [sum(float(square.norm()) for square in block) for block in squares]
    np.testing.assert_allclose(found, expected, rtol=1e-8)


def test_samples_without_a_finite_gradient_do_not_count() -> None:
    setting = make_setting("vit", SGD)
    foundation, state = setting.foundation, setting.state()
    samples = make_samples("vit", 12)
    model = SweepModel(foundation, lambda n: samples.inputs(torch.arange(n), torch.device("cpu"), torch.float64))

    def scores(rows: slice) -> np.ndarray:
        some = TensorSamples(
            {k: t[rows] for k, t in samples.tensors.items()}, samples.labels[rows], samples.domains[rows]
        )
        return FisherInformation(foundation, model, some, seed=1)(state, COUNT, 0)

    expected = scores(slice(10))
    samples.tensors["pixel_values"][10, 0, 0, 0] = torch.nan
    samples.tensors["pixel_values"][11, 0, 0, 0] = torch.inf
    np.testing.assert_allclose(scores(slice(12)), expected, rtol=1e-8)


def test_accuracy_and_loss_of_a_domain_are_those_of_its_samples_alone() -> None:
    setting = make_setting("vit", SGD)
    foundation, lora, state = setting.foundation, setting.lora, setting.state()
    samples, blocks = replace(make_samples("vit", 24), domains=torch.arange(24) % 3), np.arange(1, DEPTH)
    model = SweepModel(foundation, lambda n: samples.inputs(torch.arange(n), torch.device("cpu"), torch.float64))
    evaluator = Evaluator(foundation, model, samples, ["first", "second", "third"])
    found = evaluator.scores(state, EvaluatedModel(blocks))

    held = np.isin(np.arange(DEPTH), blocks)[None]
    submodel = Submodel(foundation, lora, Assignment(held), 0, 0, state)
    (logits,) = submodel.logits(samples.inputs(torch.arange(24), torch.device("cpu"), torch.float64))
    losses = torch.nn.functional.cross_entropy(logits.detach(), samples.labels, reduction="none")
    for index, score in enumerate(found.values()):
        mine = samples.domains == index
        assert score.accuracy == pytest.approx(float((logits.argmax(1) == samples.labels)[mine].double().mean()))
        assert score.loss == pytest.approx(float(losses[mine].mean()), rel=1e-10)
        expected = f1_score(samples.labels[mine], logits[mine].argmax(1), average="macro")
        assert score.others["macro_f1"] == pytest.approx(expected)
        assert 0 < score.others["calibration_error"] < 1
    assert list(measures(found)) == evaluator.measures == ["accuracy", "test_loss", "macro_f1", "calibration_error"]
    assert measures(found)["test_loss"] == {name: score.loss for name, score in found.items()}


def right(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.argmax(1) == labels


class Count(Metric):
    """The number of predictions."""

    def sums(self, predictions: Predictions) -> Tensor:
        return predictions.sum_by_domain(torch.ones_like(predictions.labels))

    def value(self, sums: Tensor) -> float:
        return float(sums)


@pytest.mark.parametrize("family", ["vit", "llama_lm"])
def test_a_metric_of_ones_own_sees_every_prediction_once(
    family: str, own_names: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of samples, also with several exits and models of clients, or of tokens in chunks."""
    register_metric("right")(right)
    register_metric("count")(Count)
    monkeypatch.setattr(token_loss, "CHUNK_LOGITS", 7 * VOCABULARY)
    monkeypatch.setattr(evaluation, "_BATCH", 5)
    setting = replace(make_setting(family, SGD), exits=3 if family == "vit" else 1)
    state, samples = setting.state(), replace(make_samples(family, 12), domains=torch.arange(12) % 2)
    model = SweepModel(
        setting.foundation, lambda n: samples.inputs(torch.arange(n), torch.device("cpu"), torch.float64)
    )
    evaluator = Evaluator(setting.foundation, model, samples, ["first", "second"])
    exits = (1, 2, 3) if family == "vit" else ()
    whole = EvaluatedModel(np.arange(DEPTH), exits)
    other = replace(state, adapters=-state.adapters)
    of_clients = evaluator.personal_scores({0: [state, other], 1: [other]}, ["first", "second"], state, whole)
    predictions = torch.ones(12) if family == "vit" else (samples.labels[:, 1:] != NOT_LEARNT).sum(1)
    for scores in (evaluator.scores(state, whole), of_clients):
        for domain, score in enumerate(scores.values()):
            assert score.others["right"] == pytest.approx(score.accuracy)
            assert score.others["count"] == predictions[domain::2].sum()
        if family == "llama_lm":
            names = ["accuracy", "test_loss", "perplexity", "right", "count"]
            assert list(measures(scores)) == evaluator.measures == names
            assert scores["first"].others["perplexity"] == pytest.approx(np.exp(scores["first"].loss))
        else:
            assert 0 < scores["first"].accuracy < 1


def test_a_prediction_without_finite_logits_is_wrong_and_has_no_loss(caplog: pytest.LogCaptureFixture) -> None:
    setting = make_setting("vit", SGD)
    samples = make_samples("vit", 12)
    model = SweepModel(
        setting.foundation, lambda n: samples.inputs(torch.arange(n), torch.device("cpu"), torch.float64)
    )
    evaluator = Evaluator(setting.foundation, model, samples, ["all"])
    state, whole = setting.state(), EvaluatedModel(np.arange(DEPTH))
    before = evaluator.scores(state, whole)["all"]
    samples.tensors["pixel_values"][:, 0, 0, 0] = torch.nan
    samples.tensors["pixel_values"][:9, 0, 0, 0] = 0
    after = evaluator.scores(state, whole)["all"]
    assert 0 < after.loss < 10 * before.loss
    assert after.accuracy <= 9 / 12
    assert "all: 3 of 12 predictions count as wrong" in caplog.text


@pytest.mark.parametrize("index", [0, 2])
def test_with_several_processes_progress_ends_at_the_total(monkeypatch: pytest.MonkeyPatch, index: int) -> None:
    stages = list[Stage]()

    def stage(what: str, total: int) -> Stage:
        stages.append(Stage(what, total))
        return stages[-1]

    monkeypatch.setattr(evaluation, "_BATCH", 3)
    monkeypatch.setattr(evaluation, "Stage", stage)
    monkeypatch.setattr(Processes, "all_reduce_", lambda processes, tensors: None)
    setting, samples = make_setting("vit", SGD), make_samples("vit", 10)
    cpu = torch.device("cpu")
    model = SweepModel(setting.foundation, lambda n: samples.inputs(torch.arange(n), cpu, torch.float64))
    evaluator = Evaluator(setting.foundation, model, samples, ["all"], Processes(index, 3, cpu))
    evaluator.sample_scores(setting.state(), EvaluatedModel(np.arange(DEPTH)))
    assert [(each.done, each.total) for each in stages] == [(10, 10)]


class OneOfTwo(Processes):
    """The process `index` of two; the other one has found `other`."""

    def __init__(self, index: int, other: list[Any] | None = None) -> None:
        super().__init__(index, 2, torch.device("cpu"))
        self.other = other
        self.own: list[list[Any]] = []

    def all_gather_object(self, value: Any) -> list[Any]:
        self.own.append(value)
        other = value if self.other is None else self.other[len(self.own) - 1]
        return [value, other] if self.index == 0 else [other, value]


@pytest.mark.parametrize("clients", [1, 2, 3])
def test_two_processes_score_the_clients_of_a_domain_as_one_does(clients: int) -> None:
    setting, names = make_setting("vit", SGD), ["without clients", "with clients"]
    foundation, state = setting.foundation, setting.state()
    samples = make_samples("vit", 12)
    samples = TensorSamples(samples.tensors, samples.labels, torch.arange(12) % 2)
    model = SweepModel(foundation, lambda n: samples.inputs(torch.arange(n), torch.device("cpu"), torch.float64))
    alone = Evaluator(foundation, model, samples, names)
    states = {1: [replace(state, heads=state.heads * scale) for scale in (1.0, 2.0, 3.0)[:clients]]}

    def scores(processes: Processes) -> Any:
        evaluator = replace(alone, processes=processes)
        return evaluator.personal_scores(states, names, state, EvaluatedModel(np.arange(DEPTH)))

    second = OneOfTwo(1)
    scores(second)
    assert scores(OneOfTwo(0, second.own)) == scores(Processes.alone())
    # Of a client's own domain alone.
    sent = [sums for gathered in second.own for _, metrics in gathered for sums in metrics.values()]
    assert {len(sums) for sums in sent} == {1}
    assert all(sums.untyped_storage().nbytes() == sums.nbytes for sums in sent)
