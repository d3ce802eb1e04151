"""Metrics of predictions beside accuracy and loss, each computed from sums that batches and processes add up.

Macro-F1, the expected calibration error, and those that users register.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fedra_engine.config.options import registering
from fedra_engine.federation.records import RECORDED
from fedra_engine.models.token_loss import predicted_classes
from fedra_engine.runtime.errors import InputError, shown
from fedra_engine.runtime.measure_text import register_share
from fedra_engine.runtime.processes import Processes

Function = Callable[[Tensor, Tensor], Tensor]
"""`metric(logits, labels)` gives the value of each prediction, [predictions]; the metric is their mean."""
_Entry = TypeVar("_Entry", bound=Any)

BINS = 15
"""Bins of the calibration error, as in the paper's experiments."""
_GRID = 2.0**30
"""Confidences are rounded to multiples of 1 / `_GRID`, so that float64 sums of 8 million are exact, in any order."""


@dataclass(frozen=True)
class Predictions:
    """Predictions of samples or, for a causal language model, of the learnt tokens of texts.

    Attributes:
        logits: [predictions, classes], on the evaluation's device; a prediction may have some that are not finite.
        labels: int64 [predictions], the true classes.
        domains: int64 [predictions], index of each one's domain.
        domain_count: number of domains.
    """

    logits: Tensor
    labels: Tensor
    domains: Tensor
    domain_count: int

    @cached_property
    def predicted(self) -> Tensor:
        """int64 [predictions], the class of the largest logit; -1 where that is not finite."""
        predicted, defined = predicted_classes(self.logits)
        return predicted.where(defined, -1)

    @cached_property
    def probabilities(self) -> Tensor:
        """[predictions, classes], the softmax of the logits."""
        return self.logits.softmax(1)

    def sum_by_domain(self, values: Tensor) -> Tensor:
        """Sum `values` [predictions, …] over the predictions of each domain, float64 [domains, …]."""
        sums = torch.zeros(self.domain_count, *values.shape[1:], dtype=torch.float64, device=values.device)
        return sums.index_add_(0, self.domains, values.double())


class Metric(ABC):
    """A metric that is computed from sums over predictions, so that the order and division of these does not matter."""

    @abstractmethod
    def sums(self, predictions: Predictions) -> Tensor:
        """What some predictions add, [domains, …]; the sums of all predictions are added up in float64."""

    @abstractmethod
    def value(self, sums: Tensor) -> float:
        """The metric of one domain from its sums, float64 […] on the CPU; NaN if it is not defined."""


class MeanMetric(Metric):
    """The mean of a function over the predictions of a domain, without those whose largest logit is not finite."""

    def __init__(self, name: str, function: Function) -> None:
        """`name` is for messages."""
        self._name = name
        self._function = function

    def sums(self, predictions: Predictions) -> Tensor:
        rows = torch.nonzero(predictions.predicted >= 0)[:, 0]
        if not len(rows):
            return predictions.logits.new_zeros(predictions.domain_count, 2)
        if len(rows) < len(predictions.labels):
            parts = predictions.logits[rows], predictions.labels[rows], predictions.domains[rows]
            predictions = Predictions(*parts, predictions.domain_count)
        values = self._function(predictions.logits, predictions.labels)
        if not isinstance(values, Tensor) or values.shape != predictions.labels.shape:
            found = f"a tensor {list(values.shape)}" if isinstance(values, Tensor) else shown(values)
            raise InputError(f"{self._name}: found {found} as its values, expected a tensor [{len(rows)}]")
        values = values.double()
        return predictions.sum_by_domain(torch.stack([values, torch.ones_like(values)], dim=1))

    def value(self, sums: Tensor) -> float:
        total, count = sums.tolist()
        return total / count if count else math.nan


class Registered(NamedTuple):
    """A metric, whether low values are good, and whether causal language models have it, too."""

    metric: Metric
    lower_is_better: bool
    language_models: bool


METRICS: dict[str, Registered] = {}
"""The metrics by name."""
_LOWER_IS_BETTER = ("test_loss", "perplexity")


def register_metric(
    name: str, *, lower_is_better: bool = False, language_models: bool = True, share: bool = False
) -> Callable[[_Entry], _Entry]:
    """Decorate a function or a subclass of `Metric`, to have it measured in every evaluation of later runs.

    A function `(logits [predictions, classes], labels [predictions])` gives a value of each prediction, [predictions];
    the metric is their mean. The class is made without arguments.

    Args:
        name: of the metric in `metrics.jsonl` and `summary.json`, in `early_stopping.measure` and in `keep_best`.
        lower_is_better: whether low values are good ones.
        language_models: whether it is measured on the tokens of causal language models, too.
        share: whether it is a share from 0 to 1, which is shown in percent.

    Raises:
        InputError: the name is taken, or no name as Python has them.
    """
    if not name.isidentifier() or name in RECORDED:
        raise InputError(f"metric: found the name {name!r}, expected a free one of letters, digits and _")
    put = registering(METRICS, "early_stopping.measure", name)

    def register(entry: _Entry) -> _Entry:
        is_class = isinstance(entry, type) and issubclass(entry, Metric)
        put(Registered(entry() if is_class else MeanMetric(name, entry), lower_is_better, language_models))
        if share:
            register_share(name)
        return entry

    return register


def low_is_good(measure: str) -> bool:
    """Whether low values of a measure are the good ones."""
    return measure in _LOWER_IS_BETTER or (measure in METRICS and METRICS[measure].lower_is_better)


def is_better(measure: str, value: float, best: float | None, by: float = 0.0) -> bool:
    """Whether a value of a measure is better than the `best` one, if there is any, by more than `by`; NaN never is."""
    if math.isnan(value):
        return False
    if best is None:
        return True
    return (best - value if low_is_good(measure) else value - best) > by


def metrics_of(*, language_model: bool) -> dict[str, Metric]:
    """The registered metrics of a causal language model or a classifier, by name."""
    return {name: one.metric for name, one in METRICS.items() if one.language_models or not language_model}


@register_metric("macro_f1", language_models=False)
class MacroF1(Metric):
    """The mean over the classes of F1 = 2 · right / (predicted + true).

    Classes that a domain neither has nor is predicted to have are left out, as in scikit-learn. A prediction without a
    finite logit is one of no class.
    """

    def sums(self, predictions: Predictions) -> Tensor:
        """[domains, 3, classes]: how often a class is predicted rightly, predicted, and true."""
        classes, labels, predicted = predictions.logits.shape[1], predictions.labels, predictions.predicted
        counted = torch.stack([labels.where(predicted == labels, -1), predicted, labels], dim=1)
        places = 3 * predictions.domains[:, None] + torch.arange(3, device=labels.device)
        flat = (places * classes + counted)[counted >= 0]
        counts = torch.zeros(predictions.domain_count * 3 * classes, dtype=torch.float64, device=labels.device)
        ones = torch.ones_like(flat, dtype=torch.float64)
        return counts.index_add_(0, flat, ones).view(predictions.domain_count, 3, classes)

    def value(self, sums: Tensor) -> float:
        right, predicted, true = sums
        occurs = predicted + true > 0
        return float((2 * right / (predicted + true))[occurs].mean())


@register_metric("calibration_error", lower_is_better=True, language_models=False)
class CalibrationError(Metric):
    """The expected calibration error, Σ over bins of (share of the predictions) · |accuracy − mean confidence|.

    The confidence of a prediction is its largest probability; `BINS` bins of equal width divide 0 to 1, each with its
    upper end (Guo, Pleiss, Sun and Weinberger, On Calibration of Modern Neural Networks, ICML 2017; arXiv 1706.04599).
    Predictions whose largest logit is not finite are left out.
    """

    def sums(self, predictions: Predictions) -> Tensor:
        """[domains, 2, bins]: the sum of (1 if correct, else 0) − confidence, and the number of predictions."""
        defined = predictions.predicted >= 0
        confidence = predictions.probabilities.max(1).values.double().where(defined, 1)
        correct = (predictions.predicted == predictions.labels).double()
        gaps = torch.round((correct - confidence) * _GRID) / _GRID
        bins = (confidence * BINS).ceil().long().sub_(1).clamp_(0, BINS - 1)
        pairs = torch.stack([gaps, torch.ones_like(gaps)], dim=1) * defined[:, None]
        sums = pairs.new_zeros(predictions.domain_count * BINS, 2)
        sums.index_add_(0, predictions.domains * BINS + bins, pairs)
        return sums.view(predictions.domain_count, BINS, 2).transpose(1, 2)

    def value(self, sums: Tensor) -> float:
        gaps, counts = sums
        return float(gaps.abs().sum() / counts.sum())


@dataclass
class MetricSums:
    """Running sums of `metrics` over predictions in `domain_count` domains; `sums` [domains, …] by name."""

    metrics: Mapping[str, Metric]
    domain_count: int
    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, logits: Tensor, labels: Tensor, domains: Tensor) -> None:
        """Add predictions; the arguments are attributes of `Predictions`.

        Raises:
            InputError: a user's metric gives something else than it should.
        """
        predictions = Predictions(logits, labels, domains, self.domain_count)
        for name, metric in self.metrics.items():
            more = metric.sums(predictions)
            if not isinstance(more, Tensor) or more.shape[:1] != (self.domain_count,):
                found = f"a tensor {list(more.shape)}" if isinstance(more, Tensor) else shown(more)
                raise InputError(f"{name}: found {found} as its sums, expected a tensor [{self.domain_count}, …]")
            self.sums[name] = more.double() + self.sums[name] if name in self.sums else more.double()

    def merged(self, processes: Processes) -> MetricSums:
        """The sums over the predictions of all `processes`, which call this together; on the CPU."""
        merged = MetricSums(self.metrics, self.domain_count)
        for part in processes.all_gather_object(self.on_cpu()):
            for name, sums in part.items():
                merged.sums[name] = merged.sums[name] + sums if name in merged.sums else sums
        return merged

    def on_cpu(self) -> dict[str, Tensor]:
        """`sums`, on the CPU."""
        return {name: sums.cpu() for name, sums in self.sums.items()}

    def of_domain(self, domain: int) -> MetricSums:
        """The sums of only the domain with this index, on the CPU."""
        # A view would keep all of them, and be sent with them.
        rows = {name: sums[domain : domain + 1].clone().cpu() for name, sums in self.sums.items()}
        return MetricSums(self.metrics, 1, rows)

    def values(self, domain: int) -> dict[str, float]:
        """The metrics of the domain with this index, from sums on the CPU; NaN without any predictions."""
        return {
            name: float(metric.value(self.sums[name][domain])) if name in self.sums else math.nan
            for name, metric in self.metrics.items()
        }
