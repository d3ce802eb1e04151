"""Fit the stand-ins of all blocks to the hidden states of unlabelled samples (models/stand_ins.py)."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedra_engine.config import MethodConfig
from fedra_engine.data.samples import Samples
from fedra_engine.execution.evaluation import Portion, portions
from fedra_engine.execution.sweep_model import SweepModel
from fedra_engine.models.foundation import Foundation
from fedra_engine.models.stand_ins import StandIns
from fedra_engine.models.state import GlobalState
from fedra_engine.runtime.errors import InputError
from fedra_engine.runtime.processes import Processes
from fedra_engine.runtime.randomness import generator
from fedra_engine.runtime.stages import Stage

_BATCH, _TOKENS = 64, 16_384
"""Samples and tokens of a pass; bound the memory of hidden states, which are converted to float64 block by block.

The sums of all blocks take 16 bytes × blocks × features² besides.
"""
_ROUNDING = 1e-12
"""Variance, relative to the largest second moment, that float64 cannot tell from none."""


@dataclass(frozen=True)
class StandInFit:
    """Fits stand-ins to the global model; all processes call it together and each sees a share of the samples.

    Attributes:
        samples: of the clients or of the server; their labels are not used.
        rows: int64 [rows], the samples that may be drawn.
    """

    foundation: Foundation
    model: SweepModel = field(repr=False)
    samples: Samples
    rows: NDArray[np.int64] = field(repr=False)
    config: MethodConfig = field(repr=False)
    seed: int
    processes: Processes = field(repr=False)

    def is_due(self, round: int) -> bool:
        """Whether the maps are fitted again before `round`."""
        every = self.config.stand_in_refit
        return every is not None and round > 0 and round % every == 0

    @torch.no_grad()
    def __call__(self, state: GlobalState, round: int) -> StandIns:
        """Fit the maps to the blocks of `state`, on samples that are drawn for `round`.

        Raises:
            InputError: the rank exceeds the number of features, or hidden states are not finite.
        """
        rng, config = generator(self.seed, round=round, purpose="stand-ins"), self.config
        wanted = min(config.stand_in_samples, len(self.rows))
        chosen = torch.from_numpy(rng.choice(self.rows, wanted, replace=False))
        moments: dict[int, _Moments] = {}
        lengths = self.samples.lengths
        longest = 1 if lengths is None else int(lengths[chosen].max())
        size = max(1, min(_BATCH, _TOKENS // longest))
        with self.processes.raise_on_all(), Stage("fitting stand-ins", len(chosen)) as stage:
            for portion in portions(chosen, size, self.processes):
                self._add_moments(moments, state, portion)
                stage.advance(len(portion.rows) * self.processes.count)
        self.processes.all_reduce_([tensor for block in sorted(moments) for tensor in moments[block].tensors()])
        maps = [moments[block].fit(config.stand_in_rank, config.stand_in_ridge) for block in sorted(moments)]
        return StandIns(*(torch.stack(parts).to(state.adapters) for parts in zip(*maps, strict=True)))

    def _add_moments(self, moments: dict[int, _Moments], state: GlobalState, portion: Portion) -> None:
        """Add what the samples of `portion` contribute to the moments of each block."""
        foundation = self.foundation
        foundation.use_base(state.base)
        inputs = self.samples.inputs(portion.rows, foundation.device, foundation.dtype)
        mask = inputs.get("attention_mask")

        def see(block: int, before: Tensor, after: Tensor) -> None:
            # Nobody reads what is computed for padding.
            x, y = (of if mask is None else of[mask.bool()] for of in (before.double(), after.double()))
            of_block = moments.setdefault(block, _Moments.zeros(x.shape[-1], x.device))
            if not portion.is_padding:
                of_block.add(x.flatten(0, -2), (y - x).flatten(0, -2))

        self.model.watch_blocks(inputs, state.adapters, see)


@dataclass(frozen=True)
class _Moments:
    """Sums over tokens of x, y, x xᵀ and x yᵀ, float64, for the regression of y on x; and the number of tokens."""

    count: Tensor
    x: Tensor
    y: Tensor
    xx: Tensor
    xy: Tensor

    @classmethod
    def zeros(cls, features: int, device: torch.device) -> _Moments:
        shapes = ((1,), (features,), (features,), (features, features), (features, features))
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    def tensors(self) -> list[Tensor]:
        return [self.count, self.x, self.y, self.xx, self.xy]

    def add(self, x: Tensor, y: Tensor) -> None:
        self.count.add_(len(x))
        self.x.add_(x.sum(0))
        self.y.add_(y.sum(0))
        self.xx.addmm_(x.T, x)
        self.xy.addmm_(x.T, y)

    def fit(self, rank: int, ridge: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The mean of x, the factors of the regression's matrix M [features, rank] and [rank, features], the mean of y.

        M = (X'X + λ I)⁻¹ X'Y with centred X and Y and λ = `ridge` times the mean diagonal entry of X'X. The right
        singular vectors Q of the fitted values X M give its best approximation of rank k, M Q_k Q_kᵀ.
        """
        features = len(self.x)
        if rank > features:
            raise InputError(
                f"method.stand_in_rank: found {rank} with a model of {features} features, expected no more than these"
            )
        if not (self.xx.isfinite().all() and self.xy.isfinite().all()):
            raise InputError(
                "method.stand_in: found hidden states that are not finite, expected finite ones (float32 is the widest "
                "model.dtype)"
            )
        mean_x, mean_y = self.x / self.count, self.y / self.count
        xx = self.xx - self.count * mean_x[:, None] * mean_x
        xy = self.xy - self.count * mean_x[:, None] * mean_y
        # Where all tokens are alike, what is left of their variance is rounding.
        rounding = _ROUNDING * self.xx.diagonal().max() + torch.finfo(torch.float32).tiny
        penalty = (ridge * xx.diagonal().mean()).clamp(min=rounding)
        matrix = torch.linalg.solve(xx + penalty * torch.eye(features).to(xx), xy)
        directions = torch.linalg.eigh(matrix.T @ xx @ matrix).eigenvectors[:, features - rank :]
        # A sign of their own would differ from machine to machine.
        directions *= directions.gather(0, directions.abs().argmax(0, keepdim=True)).sign()
        return mean_x, matrix @ directions, directions.T, mean_y
