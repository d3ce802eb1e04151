"""The sweep executor, which trains many clients in one pass over the blocks."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from fedra_engine.config import LoraConfig
from fedra_engine.data.samples import Samples
from fedra_engine.execution.banks import SpareBanks, clip_factors, loss_scale
from fedra_engine.execution.dropout import DropoutKeys
from fedra_engine.execution.lanes import LanePool
from fedra_engine.execution.plan import RequestedTables, StepTables
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
        tables: StepTables | None = None
        with Stage(LOCAL_STEPS, int(work.steps().sum())) as stage:
            while True:
                pool.refill()
                lanes = pool.in_training()
                if not (bool(lanes) if self.sharded_over is None else self.sharded_over.any(bool(lanes))):
                    pool.end()
                    return
                if not lanes:
                    # Other processes still train, and a sharded model needs this process in every pass.
                    first = torch.zeros(1, dtype=torch.int64)
                    self.model.dummy_pass(self.samples.inputs(first, foundation.device, foundation.dtype))
                    continue
                if tables is None or not tables.fits(lanes):
                    fewest = self.model.fewest_first_token_samples
                    tables = StepTables(
                        lanes, foundation, assignment, self._requested, fewest_first_token_samples=fewest
                    )
                self._requested.clear()
                self._step(pool, tables, factors, stand_ins)
                stage.advance(len(lanes))
                if updates := pool.take_finished():
                    yield updates

    def _step(self, pool: LanePool, tables: StepTables, factors: BankFactors, stand_ins: Sequence[LowRankMap]) -> None:
        """Take one local step of every client in training."""
        foundation, work = self.foundation, pool.work
        rows = torch.from_numpy(np.concatenate([lane.batch for lane in tables.groups]))
        clients, steps = [lane.client for lane in tables.groups], [lane.step for lane in tables.groups]
        # Copies at early exits have the draws of their sources.
        draws = SampleDraws(work.seed, work.round, clients, steps, [len(lane.batch) for lane in tables.groups])
        dropout = None
        if self.lora.dropout > 0:
            first = slice(len(tables.lanes))
            dropout = DropoutKeys(self.lora.dropout, work.seed, work.round, clients[first], steps[first])
        batch = self.samples.batch(rows, foundation.device, foundation.dtype, draws)
        features = self.model.features(batch.inputs, tables.plan, factors, dropout, stand_ins)
        if not features.requires_grad:
            # Nobody here has adapters to train; the gradients of the heads need a backward pass all the same.
            features.requires_grad_()
        heads = PassHeads(pool.heads.parameters, pool.heads.gradients, tables.plan.heads, tables.exits)
        losses = foundation.task.losses(features, batch, heads)
        scale = loss_scale(foundation.dtype)
        self.model.backward(losses.sum() * scale)
        if scale != 1:
            for bank in (pool.adapters, pool.heads):
                bank.gradients /= scale
        pool.losses[tables.indices] += losses.detach().double() * tables.samples
        for lane in tables.lanes:
            lane.step += 1
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
