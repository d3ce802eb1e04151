"""What executors need of preprocessed data."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Samples(Protocol):
    """Preprocessed samples, gathered by row."""

    @property
    def labels(self) -> Tensor:
        """int64 [samples], on the CPU."""
        ...

    @property
    def domains(self) -> Tensor:
        """int64 [samples], index of each sample's domain, on the CPU."""
        ...

    def inputs(self, rows: Tensor, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """The model's keyword arguments for the samples `rows` (int64, on the CPU), first dimension [rows]."""
        ...
