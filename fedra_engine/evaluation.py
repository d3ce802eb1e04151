"""Top-1 accuracy of the global model on every domain's test set."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import linear

from fedra_engine.config import LoraConfig
from fedra_engine.data.samples import Samples
from fedra_engine.execution.plan import make_plan
from fedra_engine.execution.sweep_model import SweepModel
from fedra_engine.models.foundation import Foundation
from fedra_engine.models.state import GlobalState

_BATCH = 256


class Evaluator:
    """Runs the global model, as the only client of a sweep, over a test set."""

    def __init__(
        self,
        foundation: Foundation,
        model: SweepModel,
        test: Samples,
        lora: LoraConfig,
        domains: Sequence[str],
    ) -> None:
        self._foundation = foundation
        self._model = model
        self._test = test
        self._scale = lora.scale
        self._domains = list(domains)

    @torch.no_grad()
    def accuracy(self, state: GlobalState, blocks: NDArray[np.int64]) -> dict[str, float]:
        """Share of correct predictions per domain, of the model with `blocks` (ascending) and its adapters."""
        correct = torch.cat(
            [self._correct(state, blocks, rows) for rows in torch.arange(len(self._test.labels)).split(_BATCH)]
        )
        return {
            name: float(correct[self._test.domains == index].double().mean())
            for index, name in enumerate(self._domains)
        }

    def _correct(self, state: GlobalState, blocks: NDArray[np.int64], rows: torch.Tensor) -> torch.Tensor:
        device, dtype = state.head.device, self._foundation.dtype
        slots = np.full((1, self._foundation.depth), -1, dtype=np.int64)
        # The global adapters themselves are the bank: a block's slot is its index.
        slots[0, blocks] = blocks
        plan = make_plan(
            [len(rows)],
            slots,
            np.zeros(1, dtype=np.int64),
            scale=self._scale,
            dtype=state.adapters.dtype,
            device=device,
        )
        adapters = state.adapters.to(dtype)
        self._model.bind(adapters, gradients=torch.empty_like(adapters))
        features = self._model.features(self._test.inputs(rows, device, dtype), plan).to(state.head.dtype)
        head = self._foundation.head_layout
        logits = linear(features, head.weight(state.head), head.bias(state.head))
        return logits.argmax(1).cpu() == self._test.labels[rows]
