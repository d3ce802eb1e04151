"""The Fisher information of every block's adapters, measured with a sweep in which each sample is a client."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from fedra_engine.data.samples import Samples
from fedra_engine.execution.plan import HostPlan
from fedra_engine.execution.scheduling import portions
from fedra_engine.execution.sweep_model import SweepModel
from fedra_engine.models.foundation import Foundation
from fedra_engine.models.state import GlobalState
from fedra_engine.runtime.processes import Processes
from fedra_engine.runtime.randomness import generator

_SAMPLES_AT_ONCE = 32
"""Bounds the memory: every sample has gradients of its own for all blocks. Fewer would take more passes."""


class FisherInformation:
    """Scores the blocks of a state by the gradients of some training samples."""

    def __init__(
        self,
        foundation: Foundation,
        model: SweepModel,
        samples: Samples,
        *,
        scale: float,
        seed: int,
        processes: Processes | None = None,
    ) -> None:
        self._foundation = foundation
        self._model = model
        self._samples = samples
        self._scale = scale
        self._seed = seed
        self._processes = Processes.alone() if processes is None else processes

    def __call__(self, state: GlobalState, count: int, round: int) -> NDArray[np.float64]:
        """Score of each block, [blocks]: Σ over its factors of ‖mean over samples of g²‖_F.

        g is the gradient of a sample's true-class logit. `count` training samples are drawn for `round`, or all; those
        whose gradient is not finite do not count.
        """
        rng = generator(self._seed, round=round, purpose="fisher")
        total = len(self._samples.domains)
        rows = torch.from_numpy(rng.choice(total, min(count, total), replace=False))
        squares = torch.zeros_like(state.adapters)
        used = torch.zeros((), dtype=torch.int64, device=squares.device)
        for portion in portions(rows, _SAMPLES_AT_ONCE, self._processes):
            of_each = self._squared_gradients(state, portion.rows)
            if not portion.is_padding:
                finite = of_each.flatten(1).sum(1).isfinite()
                squares += of_each.masked_fill_(~finite[:, None, None], 0).sum(0)
                used += finite.sum()
        self._processes.all_reduce_([squares, used])
        layout = self._foundation.adapter_layout
        factors = (f for target in range(len(layout.targets)) for f in (layout.lora_a, layout.lora_b))
        norms = [factor(squares / used, index // 2).flatten(1).norm(dim=1) for index, factor in enumerate(factors)]
        scores: NDArray[np.float64] = torch.stack(norms).sum(0).double().cpu().numpy()
        return scores

    def _squared_gradients(self, state: GlobalState, rows: torch.Tensor) -> torch.Tensor:
        """g² of each of the samples `rows`, [rows, blocks, slot size]."""
        foundation, count = self._foundation, len(rows)
        depth, device, dtype = foundation.depth, state.adapters.device, foundation.dtype
        adapters = state.adapters.to(dtype).repeat(count, 1)
        gradients = torch.zeros_like(adapters, dtype=state.adapters.dtype)
        foundation.use_base(state.base)
        self._model.bind(adapters, gradients)
        slots = np.arange(count * depth).reshape(count, depth)
        plan = HostPlan(
            [1] * count, slots, np.arange(count), scale=self._scale, dtype=state.adapters.dtype, device=device
        ).on_device()
        batch = self._samples.batch(rows, device, dtype)
        features = self._model.features(batch.inputs, plan)
        layout, labels = foundation.head_layout, batch.labels
        weight, bias = layout.weight(state.heads[-1])[labels], layout.bias(state.heads[-1])[labels]
        self._model.backward(((features.to(weight.dtype) * weight).sum(1) + bias).sum())
        return gradients.view(count, depth, -1).square_()
