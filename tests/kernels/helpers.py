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
