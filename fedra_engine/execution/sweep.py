"""The sweep executor, which trains many clients in one pass over the blocks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from fedra_engine.config import LoraConfig
from fedra_engine.data.samples import Batch, Samples
from fedra_engine.execution.banks import SpareBanks, clip_factors, loss_scale
from fedra_engine.execution.dropout import DropoutKeys, PassDropout
from fedra_engine.execution.lanes import Lane, LanePool
from fedra_engine.execution.plan import RequestedTables, StepTables
from fedra_engine.execution.step_graph import GraphCapture, RepeatedStep
from fedra_engine.execution.sweep_block import BankFactors
from fedra_engine.execution.sweep_model import SweepModel
from fedra_engine.federation.assignment import Assignment
from fedra_engine.federation.updates import ClientUpdates
from fedra_engine.federation.work import LocalWork
from fedra_engine.models.foundation import Foundation
from fedra_engine.models.stand_ins import LowRankMap
from fedra_engine.models.state import GlobalState
from fedra_engine.models.task import PassHeads
from fedra_engine.runtime.errors import InputError
from fedra_engine.runtime.processes import Processes
from fedra_engine.runtime.randomness import SampleDraws
from fedra_engine.runtime.stages import LOCAL_STEPS, Stage

_LOG = logging.getLogger(__name__)


@dataclass
class SweepExecutor:
    """Trains `lanes` clients at a time; memory depends on the lanes, not on the number of clients.

    If the model is sharded, the processes of `sharded_over` make equally many passes.
    """

    foundation: Foundation
    model: SweepModel = field(repr=False)
    samples: Samples
    lora: LoraConfig = field(repr=False)
    lanes: int
    sharded_over: Processes | None = field(default=None, repr=False)
    capture: Callable[[], GraphCapture] | None = field(default=None, repr=False)
    """Makes what captures the local steps of a round as CUDA graphs; None if none are captured."""
    _spare: SpareBanks = field(default_factory=SpareBanks, init=False, repr=False)
    _requested: RequestedTables = field(default_factory=RequestedTables, init=False, repr=False)
    """Tables that kernels used in the last step; the next plan makes them at once, as they will be needed again."""

    def train(self, work: LocalWork, assignment: Assignment, state: GlobalState) -> Iterator[ClientUpdates]:
        """Train the participants in lanes; when memory runs out, go on with half as many.

        Clients that were in training start again; with the same draws they get the same updates.

        Raises:
            InputError: a single lane does not fit.
        """
        if self.sharded_over is not None:
            # This process cannot repeat a pass on its own, while the others wait in the middle of it.
            yield from self._train(work, assignment, state)
            return
        left = np.arange(len(work.participants))
        while len(left) > 0:
            unfinished = replace(work, participants=work.participants[left])
            finished = [np.empty(0, dtype=np.int64)]
            try:
                for updates in self._train(unfinished, assignment.select(left), state):
                    finished.append(updates.clients)
                    yield updates
                return
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                self.model.end_pass()
                left = left[~np.isin(unfinished.participants, np.concatenate(finished))]
                self._halve_lanes(len(left), error)
            # Outside of `except`, as the error's traceback holds tensors.
            clear_device_cache(garbage_collection=True)

    def _halve_lanes(self, clients: int, error: RuntimeError) -> None:
        lanes = min(self.lanes, clients)
        if lanes == 1:
            raise InputError(
                "execution.lanes: found too little memory for a single lane, expected a smaller training.batch_size or "
                "model, or execution.checkpoint_blocks"
            ) from error
        self.lanes = lanes // 2
        _LOG.warning("out of memory with %d lanes; going on with %d", lanes, self.lanes)

    def _train(self, work: LocalWork, assignment: Assignment, state: GlobalState) -> Iterator[ClientUpdates]:
        foundation = self.foundation
        foundation.use_base(state.base)
        pool = LanePool(work, assignment, state, foundation, lanes=self.lanes, spare=self._spare)
        bank = pool.adapters
        factors = BankFactors(foundation.adapter_layout, bank.compute_copy, bank.gradients, assignment.factors)
        stand_ins = [] if state.stand_ins is None else state.stand_ins.maps(foundation.dtype)
        capture = None if self.capture is None else self.capture()
        steps: _Steps | None = None
        with Stage(LOCAL_STEPS, int(work.steps().sum())) as stage:
            while True:
                if steps is None or not steps.tables.left:
                    pool.refill()
                    # Before the next tables are made, so that those of a graph do not outlive it.
                    steps = None
                    if lanes := pool.in_training():
                        steps = self._next_steps(pool, lanes, factors, stand_ins, capture)
                training = steps is not None
                if not (training if self.sharded_over is None else self.sharded_over.any(training)):
                    pool.end()
                    return
                if steps is None:
                    # Other processes still train, and a sharded model needs this process in every pass.
                    first = torch.zeros(1, dtype=torch.int64)
                    self.model.dummy_pass(self.samples.inputs(first, foundation.device, foundation.dtype))
                    continue
                self._step(work, steps)
                stage.advance(len(steps.tables.lanes))
                # No client ends before.
                if not steps.tables.left and (updates := pool.take_finished()):
                    yield updates

    def _next_steps(
        self,
        pool: LanePool,
        lanes: Sequence[Lane],
        factors: BankFactors,
        stand_ins: Sequence[LowRankMap],
        capture: GraphCapture | None,
    ) -> _Steps:
        """Make the tables of the next steps of `lanes`, and what these steps share."""
        foundation = self.foundation
        fewest = self.model.fewest_first_token_samples
        tables = StepTables(lanes, foundation, pool.assignment, self._requested, fewest_first_token_samples=fewest)
        dropout = None
        if self.lora.dropout > 0:
            dropout = PassDropout(self.lora.dropout, tables.plan, len(foundation.adapter_layout.targets))
        heads = PassHeads(pool.heads.parameters, pool.heads.gradients, tables.plan.heads, tables.exits)
        train = partial(self._train_batch, pool, tables, factors, stand_ins, dropout, heads)
        return _Steps(tables, dropout, RepeatedStep(train, tables.left, capture))

    def _step(self, work: LocalWork, steps: _Steps) -> None:
        """Take one local step of every client in training."""
        foundation, tables = self.foundation, steps.tables
        taken = tables.next_batch()
        # Copies at early exits have the draws of their sources.
        draws = SampleDraws(work.seed, work.round, tables.clients.tolist(), taken.steps.tolist(), tables.sizes)
        if steps.dropout is not None:
            steps.dropout.set_keys(DropoutKeys(self.lora.dropout, work.seed, work.round, tables.clients, taken.steps))
        batch = self.samples.batch(torch.from_numpy(taken.rows), foundation.device, foundation.dtype, draws)
        steps.repeated.run(batch)

    def _train_batch(
        self,
        pool: LanePool,
        tables: StepTables,
        factors: BankFactors,
        stand_ins: Sequence[LowRankMap],
        dropout: PassDropout | None,
        heads: PassHeads,
        batch: Batch,
    ) -> None:
        """Train on a batch: all of a step that may be captured as a CUDA graph.

        On a GPU, it must read nothing from the host that changes from step to step.
        """
        foundation = self.foundation
        self._requested.clear()
        features = self.model.features(batch.inputs, tables.plan, factors, dropout, stand_ins)
        if not features.requires_grad:
            # Nobody here has adapters to train; the gradients of the heads need a backward pass all the same.
            features.requires_grad_()
        losses = foundation.task.losses(features, batch, heads)
        scale = loss_scale(foundation.dtype)
        self.model.backward(losses.sum() * scale)
        if scale != 1:
            for bank in (pool.adapters, pool.heads):
                bank.gradients /= scale
        pool.losses[tables.indices] += losses.detach().double() * tables.samples
        self._optimize(pool, tables)

    def _optimize(self, pool: LanePool, tables: StepTables) -> None:
        tables.steps.add_(1)
        banks = [(pool.adapters, tables.slots, tables.slot_owners)]
        if self.foundation.head_layout.size:
            banks.append((pool.heads, tables.heads, tables.head_owners))
        pool.add_local_terms(tables.slots, tables.heads, tables.ranks)
        squares = torch.zeros(len(tables.lanes), dtype=torch.float64, device=pool.losses.device)
        for bank, rows, owners in banks:
            squares.index_add_(0, owners, bank.squared_gradient_norms(rows))
        clip = clip_factors(squares, pool.work.training, pool.adapters.parameters.dtype)
        for bank, rows, owners in banks:
            bank.step(rows, lr=pool.work.lr, clip=clip[owners], steps=tables.steps[owners])


class _Steps(NamedTuple):
    """The local steps that one set of tables serves; `dropout` is None if nothing is dropped."""

    tables: StepTables
    dropout: PassDropout | None
    repeated: RepeatedStep
