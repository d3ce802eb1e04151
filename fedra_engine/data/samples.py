"""Preprocessed samples: what executors need of them, and images held as bytes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fedra_engine.data.stored_rows import StoredRows


class Batch(NamedTuple):
    """Samples on a device: the model's keyword arguments, and what it should say.

    `labels` is int64 [samples]; for causal language models int64 [samples, tokens], where `labels[:, t]` is token t
    itself and -100 marks tokens not to learn (Hugging Face's convention: the loss shifts by one).
    """

    inputs: dict[str, Tensor]
    labels: Tensor


class Samples(Protocol):
    """Preprocessed samples, gathered by row."""

    @property
    def labels(self) -> Tensor:
        """int64 [samples] or, for causal language models, [samples, tokens], on the CPU."""
        ...

    @property
    def domains(self) -> Tensor:
        """int64 [samples], index of each sample's domain, on the CPU."""
        ...

    def inputs(self, rows: Tensor, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """The model's keyword arguments for the samples `rows` (int64, on the CPU), first dimension [rows]."""
        ...

    def batch(self, rows: Tensor, device: torch.device, dtype: torch.dtype) -> Batch:
        """Inputs and labels of the samples `rows`; on a GPU the host does not wait for the copies."""
        ...


@dataclass(frozen=True)
class Preprocessing:
    """Images become `channels` × `image_size` × `image_size` values in [0, 1], minus `mean`, over `std`."""

    image_size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


class SampleStore:
    """Preprocessed images."""

    def __init__(
        self,
        pixels: Tensor | StoredRows,
        labels: Tensor,
        domains: Tensor,
        preprocessing: Preprocessing,
        stored: Tensor | None = None,
    ) -> None:
        """Keep `pixels` where they are.

        Args:
            pixels: uint8 [stored, channels, height, width].
            labels: int64 [samples].
            domains: int64 [samples].
            preprocessing: how `inputs` normalises the pixels.
            stored: int64 [samples], each sample's row in `pixels`; sample i is row i when None.
        """
        self.pixels = pixels if isinstance(pixels, StoredRows) else StoredRows([pixels])
        self.labels = labels
        self.domains = domains
        self.preprocessing = preprocessing
        self._labels = StoredRows([labels])
        self._stored = stored

    def __len__(self) -> int:
        return len(self.labels)

    def inputs(self, rows: Tensor, device: torch.device | str, dtype: torch.dtype) -> dict[str, Tensor]:
        """The model's inputs for sample `rows` (int64 [n], on the CPU), normalised on `device`; see `Samples`."""
        device = torch.device(device)
        pixels = self.pixels.gather(rows if self._stored is None else self._stored[rows], device)
        # Half precision has too few digits for grey levels minus their mean.
        precise = torch.float64 if dtype == torch.float64 else torch.float32
        mean, std = _byte_statistics(self.preprocessing, device, precise)
        return {"pixel_values": pixels.to(precise).sub_(mean).div_(std).to(dtype)}

    def batch(self, rows: Tensor, device: torch.device | str, dtype: torch.dtype) -> Batch:
        """Inputs and labels of sample `rows`; see `Samples`."""
        return Batch(self.inputs(rows, device, dtype), self._labels.gather(rows, torch.device(device)))


@lru_cache
def _byte_statistics(preprocessing: Preprocessing, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation in grey levels 0…255, [channels, 1, 1]."""
    mean = torch.tensor(preprocessing.mean, dtype=dtype, device=device) * 255
    std = torch.tensor(preprocessing.std, dtype=dtype, device=device) * 255
    return mean[:, None, None], std[:, None, None]
