"""The sweep executor: many clients in one pass over the blocks, a finished client's lane refilled with the next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedra_engine.config import LoraConfig
from fedra_engine.data.samples import Samples
from fedra_engine.execution.dropout import DropoutKeys
from fedra_engine.execution.lanes import Lane, LanePool
from fedra_engine.execution.plan import SweepPlan, make_plan
from fedra_engine.execution.sweep_model import SweepModel
from fedra_engine.execution.work import ClientUpdates, LocalWork
from fedra_engine.federation.allocation import Allocation
from fedra_engine.models.foundation import Foundation
from fedra_engine.models.state import GlobalState
from fedra_kernels import head_cross_entropy


class SweepExecutor:
    """Trains `lanes` clients at a time; memory depends on the lanes, never on the number of clients."""

    def __init__(
        self, foundation: Foundation, model: SweepModel, store: Samples, lora: LoraConfig, *, lanes: int
    ) -> None:
        self._foundation = foundation
        self._model = model
        self._store = store
        self._lora = lora
        self._lanes = lanes

    def train(self, work: LocalWork, allocation: Allocation, state: GlobalState) -> Iterator[ClientUpdates]:
        """Train the round; see `Executor.train`."""
        pool = LanePool(work, allocation, state, lanes=self._lanes)
        tables: _StepTables | None = None
        while True:
            if pool.refill():
                tables = None
            lanes = pool.in_training()
            if not lanes:
                return
            if tables is None or not tables.serve(lanes):
                tables = self._tables(lanes, state)
            self._step(pool, lanes, tables, work)
            if updates := pool.take_finished():
                tables = None
                yield updates

    def _step(self, pool: LanePool, lanes: Sequence[Lane], tables: _StepTables, work: LocalWork) -> None:
        """One local step of every client in training."""
        rows = torch.from_numpy(np.concatenate([lane.batch for lane in lanes]))
        device, dtype = pool.losses.device, self._foundation.dtype
        self._model.bind(pool.adapters.parameters.to(dtype), pool.adapters.gradients)
        features = self._model.features(
            self._store.inputs(rows, device, dtype), tables.plan, self._dropout(lanes, work, device)
        )
        head, heads = self._foundation.head_layout, pool.heads
        losses, _ = head_cross_entropy(
            features.to(heads.parameters.dtype),
            head.weight(heads.parameters),
            head.bias(heads.parameters),
            self._store.labels[rows].to(device),
            tables.plan.heads,
            head.weight(heads.gradients),
            head.bias(heads.gradients),
        )
        losses.sum().backward()
        pool.losses[tables.heads] += losses.detach().double() * tables.samples
        for lane in lanes:
            lane.step += 1
        self._optimize(pool, lanes, tables, work)

    def _optimize(self, pool: LanePool, lanes: Sequence[Lane], tables: _StepTables, work: LocalWork) -> None:
        clip = torch.ones(len(lanes), dtype=pool.heads.parameters.dtype, device=pool.losses.device)
        if work.training.clip_norm is not None:
            squares = pool.heads.squared_gradient_norms(tables.heads)
            squares.index_add_(0, tables.slot_owners, pool.adapters.squared_gradient_norms(tables.slots))
            # As torch.nn.utils.clip_grad_norm_, client by client.
            clip = (work.training.clip_norm / (squares.sqrt() + 1e-6)).clamp(max=1.0).to(clip)
        steps = torch.tensor([lane.step for lane in lanes], device=pool.losses.device)
        owners = tables.slot_owners
        pool.adapters.step(tables.slots, lr=work.lr, clip=clip[owners], steps=steps[owners])
        pool.heads.step(tables.heads, lr=work.lr, clip=clip, steps=steps)

    def _dropout(self, lanes: Sequence[Lane], work: LocalWork, device: torch.device) -> DropoutKeys | None:
        if self._lora.dropout == 0:
            return None
        clients, steps = [lane.client for lane in lanes], [lane.step for lane in lanes]
        return DropoutKeys(
            self._lora.dropout, seed=work.seed, round=work.round, clients=clients, steps=steps, device=device
        )

    def _tables(self, lanes: Sequence[Lane], state: GlobalState) -> _StepTables:
        slots = np.full((len(lanes), self._foundation.depth), -1, dtype=np.int64)
        for row, lane in zip(slots, lanes, strict=True):
            row[lane.blocks] = lane.slots
        sizes = tuple(len(lane.batch) for lane in lanes)
        device = state.adapters.device
        heads = np.array([lane.index for lane in lanes], dtype=np.int64)
        plan = make_plan(
            sizes,
            slots,
            heads,
            scale=self._lora.scale,
            dtype=state.adapters.dtype,
            device=device,
        )
        owners = np.repeat(np.arange(len(lanes)), [len(lane.slots) for lane in lanes])
        return _StepTables(
            indices=tuple(lane.index for lane in lanes),
            sizes=sizes,
            plan=plan,
            heads=torch.from_numpy(heads).to(device),
            slots=torch.from_numpy(np.concatenate([lane.slots for lane in lanes])).to(device),
            slot_owners=torch.from_numpy(owners).to(device),
            samples=torch.tensor(sizes, dtype=torch.float64, device=device),
        )


@dataclass(frozen=True)
class _StepTables:
    """All index tables of a step; they serve as long as the same lanes take equally large batches.

    Attributes:
        indices, sizes: the lanes and their samples, in the order of the batch.
        plan: who goes through which block.
        heads: int64 [clients], rows of the head bank.
        slots: int64 [slots], rows of the adapter bank.
        slot_owners: int64 [slots], position of each slot's client in the batch.
        samples: float64 [clients], `sizes` on the device.
    """

    indices: tuple[int, ...]
    sizes: tuple[int, ...]
    plan: SweepPlan
    heads: Tensor
    slots: Tensor
    slot_owners: Tensor
    samples: Tensor

    def serve(self, lanes: Sequence[Lane]) -> bool:
        return self.indices == tuple(lane.index for lane in lanes) and self.sizes == tuple(
            len(lane.batch) for lane in lanes
        )
