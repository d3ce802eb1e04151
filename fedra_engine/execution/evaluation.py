"""What is measured of a state: accuracy and loss on test sets, and the Fisher information of its blocks."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from statistics import mean
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedra_engine.config import LoraConfig
from fedra_engine.data.samples import Samples
from fedra_engine.execution.plan import ExitCopy
from fedra_engine.execution.sweep_model import SweepModel
from fedra_engine.models.foundation import Foundation
from fedra_engine.models.state import EvaluatedModel, GlobalState
from fedra_engine.runtime.processes import Processes
from fedra_engine.runtime.randomness import generator
from fedra_engine.runtime.stages import Stage

_LOG = logging.getLogger(__name__)
_BATCH = 256
_FISHER_SAMPLES = 32
"""Bounds the memory: every sample has gradients of its own for all blocks. Fewer would take more passes."""


class Score(NamedTuple):
    """How good the predictions of a domain are.

    Attributes:
        accuracy: share of correct ones, 0 to 1; of a causal language model, of the learnt tokens.
        loss: mean cross entropy of a sample or token, of those that have a prediction.
    """

    accuracy: float
    loss: float


def accuracies(scores: Mapping[str, Score]) -> dict[str, float]:
    """The accuracies among scores by domain."""
    return {domain: score.accuracy for domain, score in scores.items()}


@dataclass(frozen=True)
class Evaluator:
    """Runs a model, as the only client of a sweep, over the `test` samples; several `processes` share the work.

    Each makes equally many passes, as a sharded model requires.
    """

    foundation: Foundation
    model: SweepModel
    test: Samples
    lora: LoraConfig
    domains: Sequence[str]
    processes: Processes = field(default_factory=Processes.alone)

    @torch.no_grad()
    def scores(self, state: GlobalState, model: EvaluatedModel) -> dict[str, Score]:
        """How good the predictions are, by domain. The processes share out the samples."""
        domain_of = self.test.domains
        _LOG.info("evaluating on %s test samples …", f"{len(domain_of):,}")
        sums = torch.zeros(len(self.domains), 4, dtype=torch.float64)
        score = self._scores_by(state, model)
        with Stage("evaluating test samples", len(domain_of)) as stage:
            for portion in portions(torch.arange(len(domain_of)), _BATCH, self.processes):
                scores = score(portion.rows)
                if not portion.is_padding:
                    sums.index_add_(0, domain_of[portion.rows], scores)
                stage.advance(len(portion.rows) * self.processes.count)
        self.processes.all_reduce_([sums])
        return {name: self._checked_score(name, of_domain) for name, of_domain in zip(self.domains, sums, strict=True)}

    @torch.no_grad()
    def personal_scores(
        self,
        states: Mapping[int, Iterable[GlobalState]],
        names: Sequence[str],
        newcomer: GlobalState,
        model: EvaluatedModel,
    ) -> dict[str, Score]:
        """Mean scores by domain, of the models of its own clients, which the processes share out.

        Args:
            states: of the clients by domain, as `Method.personal_states` gives them.
            names: of these domains, by index.
            newcomer: the model of a client that has not been trained, for a domain without clients.
            model: which part of each predicts.
        """
        of_domain = {names[index]: mine for index, mine in states.items() if index < len(names)}
        _LOG.info("evaluating on %s test samples …", f"{len(self.test.domains):,}")
        found = {}
        for index, name in enumerate(self.domains):
            rows = torch.nonzero(self.test.domains == index)[:, 0]
            sums = self._sums_by_client(iter(of_domain.get(name, [newcomer])), rows, model)
            accuracies, losses = zip(*map(_score, sums), strict=True)
            found[name] = Score(mean(accuracies), mean(losses))
            self._checked_score(name, torch.stack(sums).sum(0))
        return found

    def _sums_by_client(self, states: Iterator[GlobalState], rows: Tensor, model: EvaluatedModel) -> list[Tensor]:
        """The scores of the samples `rows` together, float64 [4], by each of `states`; see `Task.scores`."""
        processes = self.processes
        own, total = [], 0
        while turn := list(islice(states, processes.count)):
            total += len(turn)
            # Where the last turn has too few clients, processes evaluate one of them once more.
            score = self._scores_by(turn[min(processes.index, len(turn) - 1)], model)
            own.append(torch.cat([score(batch) for batch in rows.split(_BATCH)]).sum(0))
        return list(chain.from_iterable(zip(*processes.all_gather_object(own), strict=True)))[:total]

    def _checked_score(self, domain: str, sums: Tensor) -> Score:
        """The score of a domain's `sums`; warns of predictions without finite logits."""
        _, total, undefined, _ = sums.tolist()
        if undefined and self.processes.is_main:
            _LOG.warning(
                "%s: %.0f of %.0f predictions count as wrong, as logits are not finite", domain, undefined, total
            )
        return _score(sums)

    def _scores_by(self, state: GlobalState, model: EvaluatedModel) -> Callable[[Tensor], Tensor]:
        """Gives, for test samples int64 [samples], the `Task.scores` of the `model` in `state`, on the CPU."""
        foundation = self.foundation
        foundation.use_base(state.base)
        # The global adapters themselves are the bank: a block's slot is its index.
        adapters = state.adapters.to(foundation.dtype)
        count = max(len(model.exits), 1)
        heads = [state.heads[-1], *state.heads[: count - 1]]
        # The first group of samples goes through all blocks to the last exit; the others are copies at earlier ones.
        slots = np.full((count, foundation.depth), -1, dtype=np.int64)
        slots[0, model.blocks] = model.blocks
        copies = [ExitCopy(block, 1 + exit, 0) for exit, block in enumerate(model.exits[:-1])]

        def score(rows: Tensor) -> Tensor:
            batch = self.test.batch(rows.repeat(count), foundation.device, foundation.dtype)
            features = self.model.features_of(batch.inputs, adapters, slots, scale=self.lora.scale, copies=copies)
            return foundation.task.scores(features, batch, heads).cpu()

        return score


def _score(sums: Tensor) -> Score:
    """Of the sum float64 [4] of `Task.scores`."""
    correct, total, undefined, losses = sums.tolist()
    return Score(correct / max(total, 1), losses / (total - undefined) if total > undefined else math.nan)


@dataclass(frozen=True)
class FisherInformation:
    """Scores the blocks of a state by the gradients of some training samples, each as a client of a sweep."""

    foundation: Foundation
    model: SweepModel
    samples: Samples
    scale: float
    seed: int
    processes: Processes = field(default_factory=Processes.alone)

    def __call__(self, state: GlobalState, count: int, round: int) -> NDArray[np.float64]:
        """Score of each block, [blocks]: Σ over its factors of ‖mean over samples of g²‖_F.

        g is the gradient of a sample's true-class logit. `count` training samples are drawn for `round`, or all; those
        whose gradient is not finite do not count.
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
        """g² of each of the samples `rows`, [rows, blocks, slot size]."""
        foundation, count, depth = self.foundation, len(rows), self.foundation.depth
        adapters = state.adapters.to(foundation.dtype).repeat(count, 1)
        gradients = torch.zeros_like(adapters, dtype=state.adapters.dtype)
        foundation.use_base(state.base)
        slots = np.arange(count * depth).reshape(count, depth)
        batch = self.samples.batch(rows, foundation.device, foundation.dtype)
        features = self.model.features_of(batch.inputs, adapters, slots, gradients, scale=self.scale)
        layout, labels = foundation.head_layout, batch.labels
        weight, bias = layout.weight(state.heads[-1])[labels], layout.bias(state.heads[-1])[labels]
        self.model.backward(((features.to(weight.dtype) * weight).sum(1) + bias).sum())
        return gradients.view(count, depth, -1).square_()


class Portion(NamedTuple):
    """Samples for one pass, int64 [samples]; padding gives a process as many passes as the others have."""

    rows: Tensor
    is_padding: bool


def portions(rows: Tensor, size: int, processes: Processes) -> list[Portion]:
    """This process's share of the samples `rows` in portions of at most `size`.

    Every process gets equally many, because all must pass through a sharded model equally often. Where there are too
    few samples for that, a process passes one of them once more, as padding.
    """
    mine = rows[processes.index :: processes.count]
    passes = -(-len(rows) // (processes.count * size))
    shares = [mine[start : start + size] for start in range(0, passes * size, size)]
    return [Portion(share, False) if len(share) else Portion(rows[:1], True) for share in shares]
