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

    def weight(self, heads: Tensor) -> Tensor:
        """View […, classes, features] of heads […, size]."""
        return heads[..., : self.classes * self.features].unflatten(-1, (self.classes, self.features))

    def bias(self, heads: Tensor) -> Tensor:
        """View […, classes] of heads […, size]."""
        return heads[..., self.classes * self.features :]

    def pack(self, linear: nn.Linear) -> Tensor:
        """The parameters of `linear` as a new vector [size]; a missing bias counts as zero."""
        bias = linear.weight.new_zeros(self.classes) if linear.bias is None else linear.bias
        return torch.cat([linear.weight.detach().flatten(), bias.detach()])

    def load(self, head: Tensor, linear: nn.Linear) -> None:
        """Copy `head` [size] into the parameters of `linear`, which has a bias."""
        linear.weight.data.copy_(self.weight(head))
        linear.bias.data.copy_(self.bias(head))
