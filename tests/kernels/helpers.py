"""Random banks and groups for the kernel tests, and the kernels there are."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

import fedra_kernels
from fedra_kernels import RowGroups


def kernel_modules() -> list[ModuleType]:
    """Every module of the package."""
    names = [module.name for module in pkgutil.walk_packages(fedra_kernels.__path__, "fedra_kernels.")]
    return [importlib.import_module(name) for name in names]


def kernel_names() -> set[str]:
    """Every Triton kernel of the package."""
    return {name for module in kernel_modules() for name in vars(module) if name.endswith("_kernel")}


SCALE = 0.7
"""Of low-rank products."""


def make_groups(sizes: Sequence[int], slots: Sequence[int]) -> RowGroups:
    return RowGroups(sizes, torch.tensor(slots, dtype=torch.int64))


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """max |found - expected| / max |expected|; NaN anywhere gives NaN."""
    if expected.numel() == 0:
        return 0.0
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
