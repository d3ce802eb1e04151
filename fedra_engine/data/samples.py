"""Preprocessed samples: what executors need of them, and images held as bytes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
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


@dataclass(frozen=True)
class Preprocessing:
    """Images become `channels` × `image_size` × `image_size` values in [0, 1], minus `mean`, over `std`."""

    image_size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class SampleStore:
    """Preprocessed samples.

    Args:
        pixels: uint8 [samples, channels, height, width].
        labels: int64 [samples].
        domains: int64 [samples].
        preprocessing: how `inputs` normalises the pixels.
    """

    pixels: Tensor
    labels: Tensor
    domains: Tensor
    preprocessing: Preprocessing

    def __len__(self) -> int:
        return len(self.labels)

    def inputs(self, rows: Tensor, device: torch.device | str, dtype: torch.dtype) -> dict[str, Tensor]:
        """The model's inputs for sample `rows` (int64, on the store's device), normalised on `device`."""
        pixels = self.pixels[rows].to(device, non_blocking=True)
        # Half precision has too few digits for grey levels minus their mean.
        precise = torch.float64 if dtype == torch.float64 else torch.float32
        mean, std = _byte_statistics(self.preprocessing, torch.device(device), precise)
        return {"pixel_values": pixels.to(precise).sub_(mean).div_(std).to(dtype)}


@lru_cache
def _byte_statistics(preprocessing: Preprocessing, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation in grey levels 0…255, [channels, 1, 1]."""
    mean = torch.tensor(preprocessing.mean, dtype=dtype, device=device) * 255
    std = torch.tensor(preprocessing.std, dtype=dtype, device=device) * 255
    return mean[:, None, None], std[:, None, None]
