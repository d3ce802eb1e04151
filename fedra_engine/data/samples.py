"""Preprocessed samples: what executors need of them, and images held as bytes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedra_engine.data.augmentation import Augmentation
from fedra_engine.data.stored_rows import StoredRows
from fedra_engine.runtime.files import content_hash
from fedra_engine.runtime.randomness import SampleDraws


class LearntTokens(NamedTuple):
    """Which tokens of a batch of texts are to be learnt, on the host: sample by sample, in the order of the text.

    Attributes:
        samples: int64 [learnt], the sample in the batch.
        positions: int64 [learnt], the position of the token; at least 1, since nothing precedes the first token.
    """

    samples: NDArray[np.int64]
    positions: NDArray[np.int64]


class Batch(NamedTuple):
    """Samples on a device: the model's keyword arguments, and what it should answer.

    Attributes:
        inputs: the arguments.
        labels: int64 [samples]; for causal language models int64 [samples, tokens], where `labels[:, t]` is token t
            itself and -100 marks tokens not to learn (Hugging Face's convention: the loss shifts by one).
        learnt: of causal language models, the tokens that are not marked.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    learnt: LearntTokens | None = None


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

    @property
    def lengths(self) -> Tensor | None:
        """int64 [samples], tokens of each sample, on the CPU; None where all have equally many."""
        ...

    def digest(self) -> str:
        """Hex digest of all that a model is given, sample by sample; labels and domains are not part of it.

        Equal for equal inputs, wherever these come from and however they are kept; rows of the cache are not read.
        """
        ...

    def inputs(self, rows: Tensor, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """The model's keyword arguments for the samples `rows` (int64, on the CPU), first dimension [rows]."""
        ...

    def batch(self, rows: Tensor, device: torch.device, dtype: torch.dtype, draws: SampleDraws | None = None) -> Batch:
        """Inputs and labels of the samples `rows`; on a GPU the host does not wait for the copies.

        Training gives `draws`: samples that are to be changed at random in every step are changed by these.
        """
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
        augmentation: Augmentation | None = None,
    ) -> None:
        """Keep `pixels` where they are.

        Args:
            pixels: uint8 [stored, channels, height, width].
            labels: int64 [samples].
            domains: int64 [samples].
            preprocessing: how `inputs` normalises the pixels.
            stored: int64 [samples], each sample's row in `pixels`; sample i is row i when None.
            augmentation: changes batches that are drawn for training.
        """
        self.pixels = pixels if isinstance(pixels, StoredRows) else StoredRows([pixels])
        self.labels = labels
        self.domains = domains
        self.preprocessing = preprocessing
        self.lengths = None
        self._labels = StoredRows([labels])
        self._stored = stored
        self._augmentation = augmentation

    def __len__(self) -> int:
        return len(self.labels)

    def digest(self) -> str:
        """Of pixels and preprocessing; see `Samples`."""
        content = f"{self.preprocessing} {self.pixels.digest(self._stored)}"
        return content_hash(content.encode()).hexdigest()

    def inputs(self, rows: Tensor, device: torch.device | str, dtype: torch.dtype) -> dict[str, Tensor]:
        """The model's inputs for sample `rows` (int64 [n], on the CPU), normalised on `device`; see `Samples`."""
        return self._inputs(rows, torch.device(device), dtype, None)

    def batch(
        self, rows: Tensor, device: torch.device | str, dtype: torch.dtype, draws: SampleDraws | None = None
    ) -> Batch:
        """Inputs and labels of sample `rows`; see `Samples`."""
        device = torch.device(device)
        return Batch(self._inputs(rows, device, dtype, draws), self._labels.gather(rows, device))

    def _inputs(
        self, rows: Tensor, device: torch.device, dtype: torch.dtype, draws: SampleDraws | None
    ) -> dict[str, Tensor]:
        pixels = self.pixels.gather(rows if self._stored is None else self._stored[rows], device)
        # Half precision has too few digits for grey levels minus their mean.
        precise = torch.float64 if dtype == torch.float64 else torch.float32
        mean, std = _byte_statistics(self.preprocessing, device, precise)
        levels = pixels.to(precise)
        if draws is not None and self._augmentation is not None:
            levels = self._augmentation(levels, draws)
        return {"pixel_values": levels.sub_(mean).div_(std).to(dtype)}


@lru_cache
def _byte_statistics(preprocessing: Preprocessing, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation in grey levels 0…255, [channels, 1, 1]."""
    mean = torch.tensor(preprocessing.mean, dtype=dtype, device=device) * 255
    std = torch.tensor(preprocessing.std, dtype=dtype, device=device) * 255
    return mean[:, None, None], std[:, None, None]
