"""Metrics are those of other implementations, in whatever parts and order predictions come."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score
from torch import Tensor

from fedra_engine.execution import metrics
from fedra_engine.execution.metrics import (
    CalibrationError,
    MacroF1,
    MeanMetric,
    Metric,
    MetricSums,
    Predictions,
    is_better,
    low_is_good,
    metrics_of,
    register_metric,
)
from fedra_engine.runtime.errors import InputError
from fedra_engine.runtime.processes import Processes

COUNT, CLASSES, DOMAINS = 1000, 7, 3
OWN: dict[str, Metric] = {
    "macro_f1": MacroF1(),
    "calibration_error": CalibrationError(),
    "second": MeanMetric("second", lambda logits, labels: (logits.topk(2).indices == labels[:, None]).any(1)),
}


class Given(NamedTuple):
    """Predictions, some of whose classes are rare or absent in a domain."""

    logits: Tensor
    labels: Tensor
    domains: Tensor

    def select(self, rows: Any) -> Given:
        return Given(*(tensor[rows] for tensor in self))


@pytest.fixture
def given() -> Given:
    domains = torch.randint(0, DOMAINS, (COUNT,))
    # The last domain has neither true nor predicted samples of the last class, the second no true ones.
    labels = torch.randint(0, CLASSES - 1, (COUNT,)).where(domains > 0, torch.randint(0, CLASSES, (COUNT,)))
    logits = 2 * torch.randn(COUNT, CLASSES)
    logits[torch.arange(COUNT), labels] += 2
    logits[domains == 2, -1] = -9
    return Given(logits, labels, domains)


def values(*parts: Given, of: dict[str, Metric] = OWN) -> list[dict[str, float]]:
    """The metrics of each domain."""
    sums = MetricSums(of, DOMAINS)
    for part in parts:
        sums.add(*part)
    return [sums.merged(Processes.alone()).values(domain) for domain in range(DOMAINS)]


def calibration_error(logits: Tensor, labels: Tensor) -> float:
    """As the paper defines it, bin by bin."""
    probabilities = logits.double().softmax(1).numpy()
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels.numpy()
    error, edges = 0.0, np.linspace(0, 1, 16)
    for low, high in pairwise(edges):
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            error += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return error


def test_macro_f1_is_that_of_scikit_learn(given: Given) -> None:
    for domain, found in enumerate(values(given)):
        mine = given.select(given.domains == domain)
        expected = f1_score(mine.labels, mine.logits.argmax(1), average="macro")
        assert found["macro_f1"] == pytest.approx(expected, rel=1e-12)


def test_the_calibration_error_is_that_of_the_definition(given: Given) -> None:
    for domain, found in enumerate(values(given)):
        mine = given.select(given.domains == domain)
        expected = calibration_error(mine.logits, mine.labels)
        assert expected > 0.01
        # Softmax in float32, and the confidences' grid.
        assert found["calibration_error"] == pytest.approx(expected, abs=1e-6)


def test_a_bin_has_its_upper_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two bins the first has 0.5; in one bin with 0.75, a wrong and a right prediction would balance in part."""
    monkeypatch.setattr(metrics, "BINS", 2)
    logits = torch.tensor([[0.5, 0.5], [0.25, 0.75]], dtype=torch.float64).log()
    found = values(Given(logits, torch.tensor([1, 1]), torch.zeros(2, dtype=torch.int64)))[0]
    assert found["calibration_error"] == pytest.approx((0.5 + 0.25) / 2, abs=1e-9)


def test_a_function_is_averaged(given: Given) -> None:
    for domain, found in enumerate(values(given)):
        logits, labels, _ = given.select(given.domains == domain)
        order = logits.argsort(1, descending=True)
        assert found["second"] == pytest.approx(float((order[:, :2] == labels[:, None]).any(1).double().mean()))


class Shared(Processes):
    """One of several processes, which have found `parts`."""

    def __init__(self, parts: list[Any]) -> None:
        super().__init__(0, len(parts), torch.device("cpu"))
        self._parts = parts

    def all_gather_object(self, value: Any) -> list[Any]:
        return self._parts


@pytest.mark.parametrize("count", [2, 3, 7])
def test_several_processes_find_the_same_to_the_last_bit(given: Given, count: int) -> None:
    """Also in batches of other sizes, and where a process has no predictions."""
    expected = values(given)
    shuffled = given.select(torch.randperm(COUNT))
    parts = []
    for index in range(count):
        sums = MetricSums(OWN, DOMAINS)
        for rows in torch.arange(COUNT)[index :: count - 1].split(50 + index) if index < count - 1 else ():
            sums.add(*shuffled.select(rows))
        parts.append(sums.on_cpu())
    merged = MetricSums(OWN, DOMAINS).merged(Shared(parts))
    assert [merged.values(domain) for domain in range(DOMAINS)] == expected


def test_a_prediction_without_finite_logits_is_of_no_class_and_has_no_confidence(given: Given) -> None:
    bad = given.domains == 1
    bad &= torch.rand(COUNT) < 0.3
    spoilt = Given(given.logits.where(~bad[:, None], torch.nan), given.labels, given.domains)
    spoilt.logits[int(torch.nonzero(bad)[0])] = torch.inf
    found, without = values(spoilt)[1], values(given.select(~bad))[1]
    assert found["calibration_error"] == without["calibration_error"]
    assert found["second"] == without["second"]
    mine = given.domains == 1
    predicted = given.logits.argmax(1).where(~bad, -1)[mine]
    # -1 is none of the classes that are averaged.
    present = sorted({*given.labels[mine].tolist(), *predicted[predicted >= 0].tolist()})
    expected = f1_score(given.labels[mine], predicted, average="macro", labels=present, zero_division=0)
    assert found["macro_f1"] == pytest.approx(expected, rel=1e-12)
    assert found["macro_f1"] < without["macro_f1"]


def test_a_domain_without_predictions_has_no_values(given: Given) -> None:
    found = values(given.select(given.domains != 1))
    assert all(math.isnan(value) for value in found[1].values())
    assert not any(math.isnan(value) for value in found[0].values())
    nothing = Given(given.logits.where(given.domains[:, None] != 1, torch.nan), given.labels, given.domains)
    of_none = values(nothing)[1]
    assert of_none["macro_f1"] == 0
    assert math.isnan(of_none["calibration_error"])
    assert math.isnan(of_none["second"])


def test_a_registered_metric_is_one_of_the_classifiers_and_perhaps_of_language_models(own_names: None) -> None:
    @register_metric("margin", lower_is_better=True)
    def margin(logits: Tensor, labels: Tensor) -> Tensor:
        return logits.gather(1, labels[:, None])[:, 0] - logits.mean(1)

    @register_metric("rarest", language_models=False)
    class Rarest(Metric):
        """How many labels the rarest domain has; not a mean."""

        def sums(self, predictions: Predictions) -> Tensor:
            return predictions.sum_by_domain(torch.ones(len(predictions.labels)))

        def value(self, sums: Tensor) -> float:
            return float(sums)

    assert list(metrics_of(language_model=False)) == ["macro_f1", "calibration_error", "margin", "rarest"]
    assert list(metrics_of(language_model=True)) == ["margin"]
    assert low_is_good("margin")
    assert not low_is_good("rarest")
    given = Given(torch.randn(4, 3), torch.tensor([0, 1, 2, 0]), torch.tensor([0, 0, 0, 2]))
    found = values(given, of=metrics_of(language_model=False))
    assert [each["rarest"] for each in found] == [3, 0, 1]
    assert found[2]["margin"] == pytest.approx(float(given.logits[3, 0] - given.logits[3].mean()))


@pytest.mark.parametrize("name", ["accuracy", "loss", "macro_f1", "perplexity", "test_loss", "round", "top-2", ""])
def test_a_name_that_is_taken_or_none_is_refused(name: str) -> None:
    before = dict(metrics.METRICS)
    with pytest.raises(InputError, match=r"^(metric|early_stopping\.measure): found .*, expected a (free|name that)"):
        register_metric(name)(lambda logits, labels: labels)
    assert before == metrics.METRICS


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (lambda logits, labels: logits, r"a tensor \[1000, 7\]"),
        (lambda logits, labels: (logits[:, 0] > 0).double().mean(), r"a tensor \[\]"),
        (lambda logits, labels: 0.5, r"0\.5"),
    ],
)
def test_values_of_another_shape_are_refused(given: Given, function: Any, found: str) -> None:
    with pytest.raises(InputError, match=rf"^mine: found {found} as its values, expected a tensor \[1000\]$"):
        values(given, of={"mine": MeanMetric("mine", function)})


def test_sums_of_another_shape_are_refused(given: Given) -> None:
    class Wrong(MacroF1):
        def sums(self, predictions: Predictions) -> Tensor:
            return super().sums(predictions).sum(0)

    with pytest.raises(InputError, match=r"^mine: found a tensor \[3, 7\] as its sums"):
        MetricSums({"mine": Wrong()}, 5).add(*given)


@pytest.mark.parametrize(
    ("measure", "value", "best", "by", "better"),
    [
        ("accuracy", 0.5, None, 0.1, True),
        ("accuracy", 0.5, 0.5, 0.0, False),
        ("accuracy", 0.625, 0.5, 0.125, False),
        ("accuracy", 0.75, 0.5, 0.125, True),
        ("test_loss", 0.5, 0.75, 0.0, True),
        ("test_loss", 0.75, 0.5, 0.0, False),
        ("perplexity", 2.0, 4.0, 1.0, True),
        ("calibration_error", 0.5, 0.25, 0.0, False),
        ("macro_f1", 0.5, 0.25, 0.0, True),
        ("accuracy", math.nan, None, 0.0, False),
        ("accuracy", math.nan, 0.5, 0.0, False),
    ],
)
def test_what_is_better(measure: str, value: float, best: float | None, by: float, better: bool) -> None:
    assert is_better(measure, value, best, by) is better
