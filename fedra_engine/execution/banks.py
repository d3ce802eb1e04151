"""The trainable parameters of the clients in training, as rows of one matrix, with their optimizer."""

from __future__ import annotations

import torch
from torch import Tensor

from fedra_engine.config import TrainingConfig
from fedra_kernels import adamw, sgd, squared_norms


class Bank:
    """Parameters [rows, size] with gradients and optimizer state of the same shape; a row belongs to one client.

    The optimizer follows torch.optim.SGD (no dampening, no Nesterov) or torch.optim.AdamW, row by row.
    """

    def __init__(
        self, rows: int, size: int, training: TrainingConfig, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._training = training
        self.parameters = torch.zeros(rows, size, dtype=dtype, device=device)
        self.gradients = torch.zeros_like(self.parameters)
        moments = 2 if training.optimizer == "adamw" else int(training.momentum > 0)
        self._moments = [torch.zeros_like(self.parameters) for _ in range(moments)]

    def load(self, first: int, source: Tensor, rows: Tensor) -> None:
        """Give the bank's rows from `first` on to a new client: parameters `source[rows]` and a fresh optimizer."""
        own = slice(first, first + len(rows))
        # Straight into place: this copy is most of what a client costs the server.
        torch.index_select(source, 0, rows, out=self.parameters[own])
        for moment in self._moments:
            moment[own].zero_()

    def squared_gradient_norms(self, rows: Tensor) -> Tensor:
        """Sum of squared gradients of each row, [rows]."""
        return squared_norms(self.gradients, rows)

    def step(self, rows: Tensor, *, lr: float, clip: Tensor, steps: Tensor) -> None:
        """One optimizer step of `rows`, whose clients are at their `steps`-th (1-based) local step; clears gradients.

        `clip` [rows] multiplies the gradients.
        """
        config = self._training
        rates = torch.full_like(clip, lr)
        if config.optimizer == "sgd":
            sgd(
                self.parameters,
                self.gradients,
                self._moments[0] if self._moments else None,
                rows,
                rates,
                clip,
                momentum=config.momentum,
                weight_decay=config.weight_decay,
            )
        else:
            first, second = self._moments
            adamw(
                self.parameters,
                self.gradients,
                first,
                second,
                rows,
                rates,
                clip,
                steps,
                betas=config.betas,
                eps=config.eps,
                weight_decay=config.weight_decay,
            )
        self.gradients.zero_()
