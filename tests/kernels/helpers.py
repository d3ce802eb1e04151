"""Random banks and groups for the kernel tests."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedra_kernels import RowGroups


def make_groups(sizes: Sequence[int], slots: Sequence[int], *, seed: int = 0, shared_scale: bool = False) -> RowGroups:
    """Groups with fp64 scales, each its own unless shared."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.rand(len(sizes), generator=generator, dtype=torch.float64) + 0.5
    if shared_scale:
        scales = scales[:1].expand(len(sizes)).clone()
    return RowGroups(sizes, torch.tensor(slots, dtype=torch.int64), scales)


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """max |found - expected| / max |expected|; NaN anywhere gives NaN."""
    if expected.numel() == 0:
        return 0.0
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
