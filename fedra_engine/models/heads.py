"""The classifier as a flat vector, so that many clients' heads are rows of one bank."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class HeadLayout:
    """Where the weight [classes, features] and bias [classes] of a classifier lie in a vector of `size`.

    A classifier without a bias has room for one too, for the ops take one; it is zero and is not trained.
    """

    classes: int
    features: int
    has_bias: bool = True

    @property
    def size(self) -> int:
        """Parameters of one head."""
        return self.classes * (self.features + 1)

    @property
    def trained(self) -> slice:
        """The columns that are trained."""
        return slice(0, self.size if self.has_bias else self.classes * self.features)

    @property
    def trained_size(self) -> int:
        """Parameters of one head that are trained."""
        return self.trained.stop

    def weight(self, heads: Tensor) -> Tensor:
        """View […, classes, features] of heads […, size]."""
        return heads[..., : self.classes * self.features].unflatten(-1, (self.classes, self.features))

    def bias(self, heads: Tensor) -> Tensor:
        """View […, classes] of heads […, size]."""
        return heads[..., self.classes * self.features :]

    def pack(self, linear: nn.Linear) -> Tensor:
        """The parameters of `linear` as a new vector [size]; a missing bias is zero, a head not trained is empty."""
        if self.classes == 0:
            return linear.weight.new_zeros(0)
        bias = linear.weight.new_zeros(self.classes) if linear.bias is None else linear.bias
        return torch.cat([linear.weight.detach().flatten(), bias.detach()])

    def load(self, head: Tensor, linear: nn.Linear) -> None:
        """Copy `head` [size] into the parameters of `linear`."""
        linear.weight.data.copy_(self.weight(head))
        if self.has_bias:
            linear.bias.data.copy_(self.bias(head))
