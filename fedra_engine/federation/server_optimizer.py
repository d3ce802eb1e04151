"""Server optimizers: FedAvg, FedAvgM, FedAdam and FedYogi.

The pseudo-gradient Δ is the round's mean minus the previous global state x. FedAvg: x += η Δ. FedAvgM (Hsu et al.,
arXiv 1909.06335): m = β₁ m + Δ; x += η m. FedAdam and FedYogi (Reddi et al., ICLR 2021, arXiv 2003.00295, algorithm
2): m = β₁ m + (1 − β₁) Δ; v = β₂ v + (1 − β₂) Δ² or v = v − (1 − β₂) Δ² sign(v − Δ²); x += η m / (√v + τ); v starts
at τ². Entries that nobody trained in the round (a block, a rank of it, a frozen LoRA factor) keep values and moments.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fedra_engine.config import ServerConfig
from fedra_engine.models.state import GlobalState


class ServerOptimizer:
    """The configured optimizer of the global adapters and classifiers."""

    def __init__(self, config: ServerConfig, state: GlobalState) -> None:
        self._adapters = _Moments(config, state.adapters)
        self._heads = _Moments(config, state.heads)

    def step(
        self, previous: GlobalState, mean: GlobalState, trained: Tensor, exits: Tensor, columns: slice = slice(None)
    ) -> GlobalState:
        """Move the global state from `previous` towards the aggregated `mean`, or beyond it.

        Args:
            previous: the state before the round.
            mean: the aggregated state.
            trained: bool [blocks, slot size] or [blocks, 1], what of the adapters somebody trained.
            exits: bool [exits], classifiers that somebody trained.
            columns: the part of a slot that was trained: both factors or one. The other factor keeps its exact value.
        """
        return replace(
            mean,
            adapters=self._adapters.step(previous.adapters, mean.adapters, trained, columns),
            heads=self._heads.step(previous.heads, mean.heads, exits[:, None]),
        )

    def tensors(self) -> dict[str, Tensor]:
        """The moments, for a checkpoint."""
        kinds = {"adapters": self._adapters, "heads": self._heads}
        return {f"{kind}.{name}": tensor for kind, part in kinds.items() for name, tensor in part.moments.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Load the moments from a checkpoint."""
        for name, moment in self.tensors().items():
            moment.copy_(tensors[name])


class _Moments:
    """The optimizer over rows [rows, size]."""

    def __init__(self, config: ServerConfig, like: Tensor) -> None:
        self._config = config
        self.moments: dict[str, Tensor] = {}
        if config.optimizer != "fedavg":
            self.moments["first"] = torch.zeros_like(like)
        if config.optimizer in ("fedadam", "fedyogi"):
            self.moments["second"] = torch.full_like(like, config.tau**2)

    def step(self, previous: Tensor, mean: Tensor, trained: Tensor, columns: slice = slice(None)) -> Tensor:
        after = previous.clone()
        if not self.moments and self._config.rate == 1:
            # Also entries that nobody trained: FLoRA starts them afresh.
            after[:, columns] = mean[:, columns]
            return after
        moved = trained.expand_as(previous)[:, columns]
        direction = self._direction((mean - previous)[:, columns], moved, columns)
        after[:, columns] += self._config.rate * torch.where(moved, direction, 0)
        return after

    def _direction(self, delta: Tensor, moved: Tensor, columns: slice) -> Tensor:
        """Update the moments where `moved` is true, and return the direction of the step."""
        if not self.moments:
            return delta
        config, (beta1, beta2), adaptive = self._config, self._config.betas, "second" in self.moments
        first = self.moments["first"][:, columns]
        new_first = beta1 * first + ((1 - beta1) * delta if adaptive else delta)
        first.copy_(torch.where(moved, new_first, first))
        if not adaptive:
            return new_first
        second, square = self.moments["second"][:, columns], delta.square()
        if config.optimizer == "fedadam":
            new_second = beta2 * second + (1 - beta2) * square
        else:
            new_second = second - (1 - beta2) * square * torch.sign(second - square)
        second.copy_(torch.where(moved, new_second, second))
        return new_first / (new_second.sqrt() + config.tau)
