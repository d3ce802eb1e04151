"""Top-1 accuracy on every domain's test set, of the global model or of the clients' own."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from statistics import mean

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from fedra_engine.config import LoraConfig
from fedra_engine.data.samples import Samples
from fedra_engine.execution.plan import ExitCopy, HostPlan
from fedra_engine.execution.scheduling import portions
from fedra_engine.execution.sweep_model import SweepModel
from fedra_engine.execution.token_loss import is_right, token_scores
from fedra_engine.models.foundation import Foundation
from fedra_engine.models.sharded_parameters import gathered
from fedra_engine.models.state import EvaluatedModel, GlobalState
from fedra_engine.runtime.processes import Processes
from fedra_engine.runtime.stages import Stage

_LOG = logging.getLogger(__name__)
_BATCH = 256


class Evaluator:
    """Runs a model, as the only client of a sweep, over a test set; several processes share the work.

    Every process makes equally many passes through the model, as a sharded one requires.
    """

    def __init__(
        self,
        foundation: Foundation,
        model: SweepModel,
        test: Samples,
        lora: LoraConfig,
        domains: Sequence[str],
        processes: Processes | None = None,
    ) -> None:
        self._foundation = foundation
        self._model = model
        self._test = test
        self._scale = lora.scale
        self._domains = list(domains)
        self._processes = Processes.alone() if processes is None else processes

    @torch.no_grad()
    def accuracy(self, state: GlobalState, model: EvaluatedModel) -> dict[str, float]:
        """Share of correct predictions per domain. The processes share out the samples."""
        domain_of = self._test.domains
        _LOG.info("evaluating on %s test samples …", f"{len(domain_of):,}")
        sums = torch.zeros(len(self._domains), 3, dtype=torch.int64)
        self._use(state)
        with Stage("evaluating test samples", len(domain_of)) as stage:
            for portion in portions(torch.arange(len(domain_of)), _BATCH, self._processes):
                scores = self._score(state, model, portion.rows)
                if not portion.is_padding:
                    sums.index_add_(0, domain_of[portion.rows], scores)
                stage.advance(len(portion.rows) * self._processes.count)
        self._processes.all_reduce_([sums])
        return {name: self._checked_share(name, of_domain) for name, of_domain in zip(self._domains, sums, strict=True)}

    @torch.no_grad()
    def personal_accuracy(
        self, states: Mapping[int, Iterable[GlobalState]], newcomer: GlobalState, model: EvaluatedModel
    ) -> dict[str, float]:
        """Mean share of correct predictions per domain, of the models of its own clients; see `Method.personal_states`.

        A domain without clients has the model of a `newcomer`. The processes share out the clients.
        """
        _LOG.info("evaluating on %s test samples …", f"{len(self._test.domains):,}")
        accuracy = {}
        for index, name in enumerate(self._domains):
            rows = torch.nonzero(self._test.domains == index)[:, 0]
            scores = self._personal_scores(iter(states.get(index, [newcomer])), rows, model)
            accuracy[name] = mean(_share(of_client) for of_client in scores)
            self._checked_share(name, torch.stack(scores).sum(0))
        return accuracy

    def _personal_scores(self, states: Iterator[GlobalState], rows: Tensor, model: EvaluatedModel) -> list[Tensor]:
        """The scores of the samples `rows` together, int64 [3], by each of `states`; see `_score`."""
        processes = self._processes
        own, total = [], 0
        while turn := list(islice(states, processes.count)):
            total += len(turn)
            # Where the last turn has too few clients, processes evaluate one of them once more.
            state = turn[min(processes.index, len(turn) - 1)]
            self._use(state)
            own.append(torch.cat([self._score(state, model, some) for some in rows.split(_BATCH)]).sum(0))
        return list(chain.from_iterable(zip(*processes.all_gather_object(own), strict=True)))[:total]

    def _checked_share(self, domain: str, counts: Tensor) -> float:
        """The correct share of a domain's `counts`; warns of predictions that there were not."""
        _, total, undefined = counts.tolist()
        if undefined and self._processes.is_main:
            _LOG.warning("%s: %d of %d predictions count as wrong, as logits are not finite", domain, undefined, total)
        return _share(counts)

    def _use(self, state: GlobalState) -> None:
        self._foundation.use_base(state.base)
        adapters = state.adapters.to(self._foundation.dtype)
        self._model.bind(adapters, gradients=torch.empty_like(adapters))

    def _score(self, state: GlobalState, model: EvaluatedModel, rows: Tensor) -> Tensor:
        """How much of each of the test samples `rows` is predicted correctly, of how much, and how much of that has no
        prediction, because logits are not finite; int64 [rows, 3].

        That is 0 or 1 of 1 for a classifier, and of the learnt tokens for a causal language model.
        """
        device, dtype = state.heads.device, self._foundation.dtype
        count = max(len(model.exits), 1)
        # The first group of samples goes through all blocks to the last exit; copies of it serve the earlier ones.
        slots = np.full((count, self._foundation.depth), -1, dtype=np.int64)
        # The global adapters themselves are the bank: a block's slot is its index.
        slots[0, model.blocks] = model.blocks
        plan = HostPlan(
            [len(rows)] * count,
            slots,
            np.arange(count),
            scale=self._scale,
            dtype=state.adapters.dtype,
            device=device,
            copies=[ExitCopy(block, 1 + exit, 0) for exit, block in enumerate(model.exits[:-1])],
        ).on_device()
        batch = self._test.batch(rows.repeat(count), device, dtype)
        features = self._model.features(batch.inputs, plan)
        if self._foundation.task == "causal_lm":
            output = self._foundation.head
            with gathered(output):
                assert batch.learnt is not None
                scores = token_scores(features, batch.labels, batch.learnt, output.weight, output.bias)
            return torch.stack(scores, dim=1).cpu()
        layout = self._foundation.head_layout
        heads = [state.heads[-1], *state.heads[: count - 1]]
        logits = [
            linear(part, layout.weight(head), layout.bias(head))
            for part, head in zip(features.to(state.heads.dtype).chunk(count), heads, strict=True)
        ]
        right, defined = is_right(torch.stack(logits).mean(0), batch.labels[: len(rows)])
        return torch.stack([right, torch.ones_like(right), ~defined], dim=1).long().cpu()


def _share(counts: Tensor) -> float:
    """The correct share, of `counts` as `_score` has them."""
    correct, total, _ = counts.tolist()
    return float(correct / max(total, 1))
