"""Banks: the trainable parameters of all clients in training as rows of one matrix, with their optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fedra_engine.config import TrainingConfig
from fedra_engine.federation.local_terms import BankRows, training_terms
from fedra_kernels import adamw, sgd, squared_norms
from fedra_kernels.groups import consecutive_slots


def bytes_per_parameter(training: TrainingConfig, dtype: torch.dtype, compute_dtype: torch.dtype) -> int:
    """Bytes of a bank per parameter: the parameter, its gradient, its optimizer state and its copies."""
    copies = 2 + _moments(training) + any(term.needs_starts for term in training_terms(training))
    return copies * dtype.itemsize + (compute_dtype.itemsize if compute_dtype != dtype else 0)


def _moments(training: TrainingConfig) -> int:
    return 2 if training.optimizer == "adamw" else int(training.momentum > 0)


def loss_scale(dtype: torch.dtype) -> float:
    """The loss scale of a model in `dtype`, by which gradients must be divided (arXiv 1710.03740, §3.2).

    It keeps small gradients from vanishing in float16.
    """
    # Float16 then holds activations' gradients from 6e-11 (instead of 6e-8) up to 64. A power of two rounds nothing.
    return 2.0**10 if dtype == torch.float16 else 1.0


def clip_factors(squares: Tensor, training: TrainingConfig, dtype: torch.dtype) -> Tensor:
    """The clipping factor of each client's gradients, [clients] in `dtype`.

    As in torch.nn.utils.clip_grad_norm_, but NaN where gradients are not finite, or so large that the factor or the
    quotient of AdamW would be 0: an update of NaN is noticed, one without any change is not.
    `squares` are the squared norms of the gradients, float64 [clients].
    """
    limit = math.inf if training.clip_norm is None else training.clip_norm
    numbers = torch.finfo(dtype)
    most = limit / numbers.tiny * (limit / numbers.tiny)
    # AdamW squares the clipped gradients.
    if training.optimizer == "adamw" and limit * limit > numbers.max:
        most = numbers.max
    factors = (limit / (squares.sqrt() + 1e-6)).clamp(max=1.0)
    return factors.where(squares < most, torch.nan).to(dtype)


@dataclass(frozen=True)
class BankOptions:
    """What a bank is for.

    Attributes:
        size, dtype, device: of a row of the parameters.
        training: the optimizer's hyperparameters.
        columns: the trained columns.
        compute_dtype: precision of `compute_copy`; `dtype` when None.
        keeps_starts: keep the parameters before local training, for local terms.
        all_stepped: every row that gets gradients also takes steps.
    """

    size: int
    training: TrainingConfig
    dtype: torch.dtype
    device: torch.device
    columns: slice = field(default_factory=lambda: slice(None))
    compute_dtype: torch.dtype | None = None
    keeps_starts: bool = False
    all_stepped: bool = True


class Bank:
    """Parameters [rows, size] with gradients and optimizer state; a row belongs to one client.

    The optimizer is torch.optim.SGD (no dampening, no Nesterov) or torch.optim.AdamW, row by row.

    Attributes:
        options: what it is for.
        parameters, gradients: [rows, size].
        compute_copy: the parameters in the compute precision; the same tensor if that is their own precision.
    """

    def __init__(self, rows: int, options: BankOptions) -> None:
        self.options = options
        size, dtype, device = options.size, options.dtype, options.device
        self.parameters = torch.zeros(rows, size, dtype=dtype, device=device)
        self.gradients = torch.zeros_like(self.parameters)
        shape = self.parameters[:, options.columns].shape
        self._moments = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(_moments(options.training))]
        self._starts = torch.zeros_like(self.parameters) if options.keeps_starts else None
        lower = options.compute_dtype is not None and options.compute_dtype != dtype
        self._shadow = torch.zeros_like(self.parameters, dtype=options.compute_dtype) if lower else None
        self.compute_copy = self.parameters if self._shadow is None else self._shadow

    def load(self, own: Tensor, source: Tensor, rows: Tensor, adjust: Callable[[], None] | None = None) -> None:
        """Give the rows `own` [n] to new clients, with the parameters `source[rows]`, which `adjust` changes in place.

        Moments are not reset here: the optimizer takes them as zeros in a client's first step.
        """
        if self.parameters.device.type == "cpu":
            # Without a temporary copy: copying is a large part of a client's cost outside of training.
            for piece, target in consecutive_slots(own):
                torch.index_select(source, 0, rows[piece], out=self.parameters[target])
        else:
            self.parameters.index_copy_(0, own, source.index_select(0, rows))
        if adjust is not None:
            adjust()
        for copy in (self._starts, self._shadow):
            if copy is not None:
                copy.index_copy_(0, own, self.parameters.index_select(0, own).to(copy.dtype))
        if not self.options.all_stepped:
            # A step resets its rows' gradients; others may still have those of the client before.
            self.gradients.index_fill_(0, own, 0)

    def in_training(self, rows: Tensor) -> BankRows:
        """The bank for local terms, with its `rows` in training."""
        return BankRows(self.parameters, self.gradients, self._starts, rows)

    def squared_gradient_norms(self, rows: Tensor) -> Tensor:
        """Squared gradient norm of each of `rows` over the trained columns, float64 [rows]."""
        return squared_norms(self.gradients[:, self.options.columns], rows)

    def step(self, rows: Tensor, *, lr: float, clip: Tensor, steps: Tensor) -> None:
        """Take one optimizer step of `rows` with gradients times `clip` [rows], and reset these gradients.

        `steps` int64 [rows] are the clients' local steps, counted from 1.
        """
        config, columns = self.options.training, self.options.columns
        parameters, gradients = self.parameters[:, columns], self.gradients[:, columns]
        shadow = None if self._shadow is None else self._shadow[:, columns]
        rates = torch.full_like(clip, lr)
        moments = self._moments
        options: dict[str, Any] = {"weight_decay": config.weight_decay, "shadow": shadow, "zero_grad": True}
        if config.optimizer == "sgd":
            momentum = moments[0] if moments else None
            sgd(parameters, gradients, momentum, rows, rates, clip, steps, momentum=config.momentum, **options)
        else:
            options |= {"betas": config.betas, "eps": config.eps}
            adamw(parameters, gradients, moments[0], moments[1], rows, rates, clip, steps, **options)


class SpareBanks:
    """Banks that rounds leave to the rounds after them.

    The pages of new ones take a CPU longer than everything else that a client costs beside its training.
    """

    def __init__(self) -> None:
        self._banks: list[Bank] = []

    def take(self, rows: int, options: BankOptions) -> Bank:
        """A bank with at least so many rows, none of which is in use."""
        for position, bank in enumerate(self._banks):
            if bank.options == options and len(bank.parameters) >= rows:
                return self._banks.pop(position)
        return Bank(rows, options)

    def keep(self, *banks: Bank) -> None:
        """Keep the `banks` of a round that ended normally, and free those kept before that it did not take."""
        self._banks = [bank for bank in banks if bank.parameters.device.type == "cpu"]
