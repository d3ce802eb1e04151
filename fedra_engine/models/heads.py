"""The classifier as a flat vector, so that many clients' heads are rows of one bank."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class HeadLayout:
    """Where the weight [classes, features] and bias [classes] of a classifier lie in a vector of `size`."""

    classes: int
    features: int

    @property
    def size(self) -> int:
        """Parameters of one head."""
        return self.classes * (self.features + 1)

    def weight(self, bank: Tensor) -> Tensor:
        """View [heads, classes, features] of a bank [heads, size]."""
        return bank[:, : self.classes * self.features].unflatten(1, (self.classes, self.features))

    def bias(self, bank: Tensor) -> Tensor:
        """View [heads, classes] of a bank [heads, size]."""
        return bank[:, self.classes * self.features :]

    def pack(self, head: nn.Linear, dtype: torch.dtype) -> Tensor:
        """The parameters of `head` as a new vector [size]; a missing bias counts as zero."""
        bias = torch.zeros(self.classes) if head.bias is None else head.bias
        return torch.cat([head.weight.detach().flatten(), bias.detach()]).to(dtype)
