"""The trainable parameters of the clients in training, as rows of one matrix, with their optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fedra_engine.config import TrainingConfig
from fedra_engine.federation.local_terms import BankRows, training_terms
from fedra_kernels import adamw, sgd, squared_norms
from fedra_kernels.groups import consecutive_slots


def bytes_per_parameter(training: TrainingConfig, dtype: torch.dtype, compute_dtype: torch.dtype) -> int:
    """What a bank takes for each of its parameters: itself, its gradient, and what the optimizer keeps."""
    copies = 2 + _moments(training) + any(term.needs_starts for term in training_terms(training))
    return copies * dtype.itemsize + (compute_dtype.itemsize if compute_dtype != dtype else 0)


def _moments(training: TrainingConfig) -> int:
    return 2 if training.optimizer == "adamw" else int(training.momentum > 0)


def loss_scale(dtype: torch.dtype) -> float:
    """The factor of losses before the backward pass of a model in `dtype` (arXiv 1710.03740, §3.2).

    By it small gradients survive float16; the gradients of what is trained are divided by it again.
    """
    # Keeps gradients of activations from 6e-11 (float16 alone: 6e-8) up to 64. A power of two, which rounds nothing.
    return 2.0**10 if dtype == torch.float16 else 1.0


def clip_factors(squares: Tensor, training: TrainingConfig, dtype: torch.dtype) -> Tensor:
    """What each client's gradient is multiplied by before a step, [clients] in `dtype`, that of the parameters.

    As torch.nn.utils.clip_grad_norm_ has it, but NaN where the step would be nothing: where a gradient is not finite,
    or so large that its factor, or the quotient that AdamW steps by, would be 0. An update of NaN is noticed; one that
    changes nothing would pass as training. `squares` float64 [clients] are the sums of squares of the gradients.
    """
    limit = math.inf if training.clip_norm is None else training.clip_norm
    numbers = torch.finfo(dtype)
    most = limit / numbers.tiny * (limit / numbers.tiny)
    # AdamW keeps squares of what is left.
    if training.optimizer == "adamw" and limit * limit > numbers.max:
        most = numbers.max
    factors = (limit / (squares.sqrt() + 1e-6)).clamp(max=1.0)
    return factors.where(squares < most, torch.nan).to(dtype)


class Bank:
    """Parameters [rows, size] with gradients and optimizer state; a row belongs to one client.

    The optimizer follows torch.optim.SGD (no dampening, no Nesterov) or torch.optim.AdamW, row by row. It touches
    the trained columns only.

    Attributes:
        parameters, gradients: [rows, size].
        compute_copy: the parameters in the precision of the computation; themselves where that is their own.
    """

    def __init__(
        self,
        rows: int,
        size: int,
        training: TrainingConfig,
        *,
        dtype: torch.dtype,
        device: torch.device,
        columns: slice = slice(None),
        compute_dtype: torch.dtype | None = None,
        keeps_starts: bool = False,
        all_stepped: bool = True,
    ) -> None:
        """An empty bank.

        Args:
            rows, size: its shape.
            training: the optimizer.
            dtype, device: of the parameters.
            columns: those that are trained.
            compute_dtype: precision of `compute_copy`; `dtype` when None.
            keeps_starts: whether to remember what each row was handed out as.
            all_stepped: whether every row that gets gradients is stepped, too.
        """
        self._training = training
        # A step leaves no gradient behind, but other rows may have some when the next client takes them.
        self._stale_gradients = not all_stepped
        self.parameters = torch.zeros(rows, size, dtype=dtype, device=device)
        self.gradients = torch.zeros_like(self.parameters)
        self._columns = columns
        trained = self.parameters[:, columns]
        self._moments = [torch.zeros(trained.shape, dtype=dtype, device=device) for _ in range(_moments(training))]
        self._starts = torch.zeros_like(self.parameters) if keeps_starts else None
        lower = compute_dtype is not None and compute_dtype != dtype
        self._shadow = torch.zeros_like(self.parameters, dtype=compute_dtype) if lower else None
        self.compute_copy = self.parameters if self._shadow is None else self._shadow

    def load(self, own: Tensor, source: Tensor, rows: Tensor, adjust: Callable[[], None] | None = None) -> None:
        """Give the rows `own` [n] to new clients: parameters `source[rows]`, which `adjust` may change in place.

        They have no gradients, and the optimizer takes their moments as zeros at the first step.
        """
        if self.parameters.device.type == "cpu":
            # Straight into place: this copy is much of what a client costs the server.
            for piece, target in consecutive_slots(own):
                torch.index_select(source, 0, rows[piece], out=self.parameters[target])
        else:
            self.parameters.index_copy_(0, own, source.index_select(0, rows))
        if adjust is not None:
            adjust()
        for copy in (self._starts, self._shadow):
            if copy is not None:
                copy.index_copy_(0, own, self.parameters.index_select(0, own).to(copy.dtype))
        if self._stale_gradients:
            self.gradients.index_fill_(0, own, 0)

    def in_training(self, rows: Tensor) -> BankRows:
        """What local terms see of the bank whose `rows` are in training."""
        return BankRows(self.parameters, self.gradients, self._starts, rows)

    def squared_gradient_norms(self, rows: Tensor) -> Tensor:
        """Sum of squared gradients of each row over the trained columns, float64 [rows]."""
        return squared_norms(self.gradients[:, self._columns], rows)

    def step(self, rows: Tensor, *, lr: float, clip: Tensor, steps: Tensor) -> None:
        """One optimizer step of `rows`, whose gradients `clip` [rows] multiplies; then these are zero.

        The clients of the rows are at their `steps`-th local step, counted from 1.
        """
        columns = self._columns
        parameters, gradients = self.parameters[:, columns], self.gradients[:, columns]
        shadow = None if self._shadow is None else self._shadow[:, columns]
        rates = torch.full_like(clip, lr)
        config, moments = self._training, self._moments
        options: dict[str, Any] = {"weight_decay": config.weight_decay, "shadow": shadow, "zero_grad": True}
        if config.optimizer == "sgd":
            momentum = moments[0] if moments else None
            sgd(parameters, gradients, momentum, rows, rates, clip, steps, momentum=config.momentum, **options)
        else:
            options |= {"betas": config.betas, "eps": config.eps}
            adamw(parameters, gradients, moments[0], moments[1], rows, rates, clip, steps, **options)
