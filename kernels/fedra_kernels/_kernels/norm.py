"""The parameters of a norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True)
class Norm:
    """A frozen LayerNorm (`layer`) or RMSNorm (`rms`, without a bias): weight and bias [features]."""

    weight: Tensor
    bias: Tensor | None
    eps: float
    kind: Literal["layer", "rms"]
