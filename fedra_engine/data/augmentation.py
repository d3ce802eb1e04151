"""Random changes of training images, made on the device that trains.

The draws are the caller's (`SampleDraws`), so an image is changed in the same way whoever shares the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from fedra_engine.config import DataConfig
from fedra_engine.data.stored_rows import copy_async
from fedra_engine.runtime.randomness import SampleDraws

CROP_RATIOS = (3 / 4, 4 / 3)
"""Least and greatest width over height of a crop (arXiv 1409.4842, §6)."""
_TRIES = 10
"""Draws of a crop's area and shape, of which the first that fits into the image is taken."""


@dataclass(frozen=True)
class Augmentation:
    """A horizontal flip with even chances, after a random resized crop where there is a `crop_scale`.

    Attributes:
        crop_scale: smallest share of an image's area in a crop; None for no crop.
    """

    crop_scale: float | None

    def __call__(self, images: Tensor, draws: SampleDraws) -> Tensor:
        """`images` [samples, channels, height, width], floating point, changed by `draws`; of the same shape."""
        drawn = draws.uniform(1 if self.crop_scale is None else 3 + 2 * _TRIES)
        is_flipped = drawn[:, 0] < 0.5
        if self.crop_scale is None:
            flipped = copy_async(torch.from_numpy(is_flipped), images.device)
            return torch.where(flipped[:, None, None, None], images.flip(-1), images)
        width, height = _crop_sizes(drawn[:, 3:], self.crop_scale)
        # Images reach from -1 to 1 both ways.
        maps = np.zeros((len(images), 2, 3))
        maps[:, 0, 0], maps[:, 1, 1] = np.where(is_flipped, -width, width), height
        maps[:, 0, 2] = (1 - width) * (2 * drawn[:, 1] - 1)
        maps[:, 1, 2] = (1 - height) * (2 * drawn[:, 2] - 1)
        grid = affine_grid(
            copy_async(torch.from_numpy(maps).to(images.dtype), images.device), list(images.shape), align_corners=False
        )
        return grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def make_augmentation(config: DataConfig) -> Augmentation | None:
    """What `config.augmentation` names."""
    if config.augmentation == "none":
        return None
    return Augmentation(config.crop_scale if config.augmentation == "crop_flip" else None)


def _crop_sizes(drawn: NDArray[np.float64], scale: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Width and height of crops as shares of the image's, [samples] each, from uniform draws [samples, 2 · tries].

    Areas are uniform from `scale` to 1, ratios log-uniform in `CROP_RATIOS`; the whole image where no draw fits.
    """
    areas = scale + (1 - scale) * drawn[:, :_TRIES]
    least, greatest = np.log(CROP_RATIOS)
    ratios = np.exp(least + (greatest - least) * drawn[:, _TRIES:])
    widths, heights = np.sqrt(areas * ratios), np.sqrt(areas / ratios)
    fits = (widths <= 1) & (heights <= 1)
    first, some = np.arange(len(drawn)), fits.any(axis=1)
    chosen = fits.argmax(axis=1)
    return np.where(some, widths[first, chosen], 1.0), np.where(some, heights[first, chosen], 1.0)
