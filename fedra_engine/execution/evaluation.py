"""Evaluation of a state: accuracy, loss and other measures on test sets, and the Fisher information of its blocks."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, islice
from statistics import mean
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedra_engine.data.samples import Samples
from fedra_engine.execution.metrics import Metric, MetricSums, metrics_of
from fedra_engine.execution.plan import ExitCopy
from fedra_engine.execution.sweep_model import SweepModel
from fedra_engine.execution.threads import threads_for
from fedra_engine.models.foundation import Foundation
from fedra_engine.models.state import EvaluatedModel, GlobalState
from fedra_engine.runtime.processes import Processes
from fedra_engine.runtime.randomness import generator
from fedra_engine.runtime.stages import Stage

_LOG = logging.getLogger(__name__)
_BATCH = 256
_FISHER_SAMPLES = 32
"""Samples of a pass; bounds memory, as every sample has its own gradients for all blocks."""


class Score(NamedTuple):
    """The measures of a domain.

    Attributes:
        accuracy: share of correct predictions, 0 to 1, of samples or of a causal language model's learnt tokens.
        loss: mean cross entropy of the samples or tokens with finite logits.
        others: the other measures, by name: the registered metrics and, of a causal language model, the perplexity, e
            to the power of the loss. NaN where one is not defined.
    """

    accuracy: float
    loss: float
    others: Mapping[str, float]


def accuracies(scores: Mapping[str, Score]) -> dict[str, float]:
    """The accuracies by domain."""
    return {domain: score.accuracy for domain, score in scores.items()}


def measures(scores: Mapping[str, Score]) -> dict[str, dict[str, float]]:
    """All measures by name, `accuracy` and `test_loss` first, and then by domain."""
    named = {domain: {"accuracy": of.accuracy, "test_loss": of.loss, **of.others} for domain, of in scores.items()}
    names = dict.fromkeys(name for of_domain in named.values() for name in of_domain)
    return {name: {domain: of_domain[name] for domain, of_domain in named.items()} for name in names}


@dataclass(frozen=True)
class Evaluator:
    """Evaluates models on the `test` samples, each as the only client of a sweep.

    The `processes` share the work and make equally many passes, as a sharded model requires. All registered metrics
    of the task are measured in the same passes as accuracy and loss.
    """

    foundation: Foundation
    model: SweepModel = field(repr=False)
    test: Samples
    domains: Sequence[str] = field(repr=False)
    processes: Processes = field(default_factory=Processes.alone, repr=False)

    @cached_property
    def metrics(self) -> dict[str, Metric]:
        """The registered metrics by name."""
        return metrics_of(language_model=not self.foundation.task.trains_head)

    @property
    def measures(self) -> list[str]:
        """The names of all measures."""
        perplexity = [] if self.foundation.task.trains_head else ["perplexity"]
        return ["accuracy", "test_loss", *perplexity, *self.metrics]

    def scores(self, state: GlobalState, model: EvaluatedModel) -> dict[str, Score]:
        """Score the `model` part of `state` by domain; every process takes a share of the samples."""
        metrics = MetricSums(self.metrics, len(self.domains))
        of_samples = self.sample_scores(state, model, metrics)
        sums = torch.zeros(len(self.domains), 4, dtype=torch.float64)
        sums.index_add_(0, self.test.domains, of_samples)
        metrics = metrics.merged(self.processes)
        found = {}
        for index, (name, of_domain) in enumerate(zip(self.domains, sums, strict=True)):
            self._warn_of_undefined(name, of_domain)
            found[name] = self._score(*_accuracy_and_loss(of_domain), metrics.values(index))
        return found

    @torch.no_grad()
    def sample_scores(self, state: GlobalState, model: EvaluatedModel, metrics: MetricSums | None = None) -> Tensor:
        """`Task.scores` of every sample, float64 [samples, 4] on the CPU; every process computes a share.

        A process adds its own predictions to `metrics`.
        """
        found = torch.zeros(len(self.test.domains), 4, dtype=torch.float64)
        score = self._scores_by(state, model)
        with self._threads(), Stage("evaluating held-out samples", len(found)) as stage:
            for portion in portions(torch.arange(len(found)), _BATCH, self.processes):
                scores = score(portion.rows, None if portion.is_padding else metrics)
                if not portion.is_padding:
                    found[portion.rows] = scores
                # The last portions of other processes may be smaller, or only make up the number of passes.
                stage.advance(min(len(portion.rows) * self.processes.count, len(found) - stage.done))
        self.processes.all_reduce_([found])
        return found

    @torch.no_grad()
    def personal_scores(
        self,
        states: Mapping[int, Iterable[GlobalState]],
        names: Sequence[str],
        newcomer: GlobalState,
        model: EvaluatedModel,
    ) -> dict[str, Score]:
        """Average the scores of each domain's clients on its test samples; every process takes a share of the clients.

        Args:
            states: the clients' models by domain index, from `Method.personal_states`.
            names: the domains of these indices.
            newcomer: the model for domains without clients.
        """
        of_domain = {names[index]: mine for index, mine in states.items() if index < len(names)}
        found = {}
        with self._threads(), Stage("evaluating the clients' own models, by domain", len(self.domains)) as stage:
            for index, name in enumerate(self.domains):
                rows = torch.nonzero(self.test.domains == index)[:, 0]
                by_client = self._sums_by_client(iter(of_domain.get(name, [newcomer])), index, rows, model)
                sums, metrics = zip(*by_client, strict=True)
                accuracies, losses = zip(*map(_accuracy_and_loss, sums), strict=True)
                values = [each.values(0) for each in metrics]
                averages = {metric: mean(of_client[metric] for of_client in values) for metric in self.metrics}
                found[name] = self._score(mean(accuracies), mean(losses), averages)
                self._warn_of_undefined(name, torch.stack(sums).sum(0))
                stage.advance(1)
        return found

    def _threads(self) -> AbstractContextManager[None]:
        """Inside, passes have the threads that they keep busy."""
        return threads_for(self.foundation, self.test, _BATCH)

    def _sums_by_client(
        self, states: Iterator[GlobalState], domain: int, rows: Tensor, model: EvaluatedModel
    ) -> list[tuple[Tensor, MetricSums]]:
        """`Task.scores` summed over the samples `rows` of a domain, float64 [4], and their metrics, for each state."""
        processes = self.processes
        own, total = [], 0
        while turn := list(islice(states, processes.count)):
            total += len(turn)
            # In the last turn, processes without a client repeat one.
            score = self._scores_by(turn[min(processes.index, len(turn) - 1)], model)
            metrics = MetricSums(self.metrics, len(self.domains))
            sums = torch.cat([score(batch, metrics) for batch in rows.split(_BATCH)]).sum(0)
            # Users' metrics may be of a kind that cannot be sent.
            own.append((sums, metrics.of_domain(domain).sums))
        found = list(chain.from_iterable(zip(*processes.all_gather_object(own), strict=True)))[:total]
        return [(sums, MetricSums(self.metrics, 1, of_metrics)) for sums, of_metrics in found]

    def _score(self, accuracy: float, loss: float, metrics: Mapping[str, float]) -> Score:
        perplexity = {} if self.foundation.task.trains_head else {"perplexity": _perplexity(loss)}
        return Score(accuracy, loss, {**perplexity, **metrics})

    def _warn_of_undefined(self, domain: str, sums: Tensor) -> None:
        """Warn of predictions of a domain without finite logits."""
        _, total, undefined, _ = sums.tolist()
        if undefined and self.processes.is_main:
            _LOG.warning(
                "%s: %.0f of %.0f predictions count as wrong, as logits are not finite", domain, undefined, total
            )

    def _scores_by(self, state: GlobalState, model: EvaluatedModel) -> Callable[[Tensor, MetricSums | None], Tensor]:
        """A function from rows of the test set, int64 [samples], to their `Task.scores` on the CPU.

        It adds the predictions to the `MetricSums`.
        """
        foundation = self.foundation
        foundation.use_base(state.base)
        # The global adapters are the bank: a block's slot is its index.
        adapters = state.adapters.to(foundation.dtype)
        count = max(len(model.exits), 1)
        heads = [state.heads[-1], *state.heads[: count - 1]]
        # The first group goes through all blocks to the last exit; the others are its copies at earlier exits.
        slots = np.full((count, foundation.depth), -1, dtype=np.int64)
        slots[0, model.blocks] = model.blocks
        copies = [ExitCopy(block, 1 + exit, 0) for exit, block in enumerate(model.exits[:-1])]

        def score(rows: Tensor, metrics: MetricSums | None) -> Tensor:
            batch = self.test.batch(rows.repeat(count), foundation.device, foundation.dtype)
            features = self.model.features_of(batch.inputs, adapters, slots, copies=copies)
            if metrics is None or not metrics.metrics:
                return foundation.task.scores(features, batch, heads).cpu()
            domains = self.test.domains[rows].to(foundation.device)

            def watch(logits: Tensor, labels: Tensor, samples: Tensor) -> None:
                metrics.add(logits, labels, domains[samples])

            return foundation.task.scores(features, batch, heads, watch).cpu()

        return score


def _accuracy_and_loss(sums: Tensor) -> tuple[float, float]:
    """`sums` are float64 [4], `Task.scores` summed over samples."""
    correct, total, undefined, losses = sums.tolist()
    return correct / max(total, 1), losses / (total - undefined) if total > undefined else math.nan


def _perplexity(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


@dataclass(frozen=True)
class FisherInformation:
    """Scores blocks by the gradients of training samples, each sample being a client of a sweep."""

    foundation: Foundation
    model: SweepModel = field(repr=False)
    samples: Samples
    seed: int
    processes: Processes = field(default_factory=Processes.alone, repr=False)

    def __call__(self, state: GlobalState, count: int, round: int) -> NDArray[np.float64]:
        """Score the blocks of `state`, float64 [blocks], by Σ over a block's factors of ‖mean over samples of g²‖_F.

        g is the gradient of a sample's true-class logit. `count` training samples are drawn for `round`, or all; those
        whose gradient is not finite are left out.
        """
        rng, total = generator(self.seed, round=round, purpose="fisher"), len(self.samples.domains)
        rows = torch.from_numpy(rng.choice(total, min(count, total), replace=False))
        squares = torch.zeros_like(state.adapters)
        used = torch.zeros((), dtype=torch.int64, device=squares.device)
        for portion in portions(rows, _FISHER_SAMPLES, self.processes):
            of_each = self._squared_gradients(state, portion.rows)
            if not portion.is_padding:
                finite = of_each.flatten(1).sum(1).isfinite()
                squares += of_each.masked_fill_(~finite[:, None, None], 0).sum(0)
                used += finite.sum()
        self.processes.all_reduce_([squares, used])
        layout, means = self.foundation.adapter_layout, squares / used
        targets = range(len(layout.targets))
        factors = (factor(means, target) for target in targets for factor in (layout.lora_a, layout.lora_b))
        norms = [factor.flatten(1).norm(dim=1) for factor in factors]
        scores: NDArray[np.float64] = torch.stack(norms).sum(0).double().cpu().numpy()
        return scores

    def _squared_gradients(self, state: GlobalState, rows: Tensor) -> Tensor:
        """g² of each sample, [rows, blocks, slot size]."""
        foundation, count, depth = self.foundation, len(rows), self.foundation.depth
        adapters = state.adapters.to(foundation.dtype).repeat(count, 1)
        gradients = torch.zeros_like(adapters, dtype=state.adapters.dtype)
        foundation.use_base(state.base)
        slots = np.arange(count * depth).reshape(count, depth)
        batch = self.samples.batch(rows, foundation.device, foundation.dtype)
        features = self.model.features_of(batch.inputs, adapters, slots, gradients)
        layout, labels = foundation.head_layout, batch.labels
        weight, bias = layout.weight(state.heads[-1])[labels], layout.bias(state.heads[-1])[labels]
        scaled = layout.scaled(features.to(weight.dtype), layout.norm_parameters(state.heads[-1]))
        self.model.backward(((scaled * weight).sum(1) + bias).sum())
        return gradients.view(count, depth, -1).square_()


class Portion(NamedTuple):
    """The samples of one pass, int64 [samples], and whether they only make up the number of passes."""

    rows: Tensor
    is_padding: bool


def portions(rows: Tensor, size: int, processes: Processes) -> list[Portion]:
    """This process's share of the samples `rows`, in portions of at most `size`.

    All processes get the same number of portions, as a sharded model requires; one that lacks samples gets padding.
    """
    mine = rows[processes.index :: processes.count]
    passes = -(-len(rows) // (processes.count * size))
    shares = [mine[start : start + size] for start in range(0, passes * size, size)]
    return [Portion(share, False) if len(share) else Portion(rows[:1], True) for share in shares]
