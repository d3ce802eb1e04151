"""The image size and normalisation that a model expects, and augmentation on the model's device.

Augmentation takes its draws from the caller (`SampleDraws`), so it does not depend on which clients share a batch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from fedra_engine.config import DataConfig
from fedra_engine.data.cache import copy_async
from fedra_engine.runtime.errors import InputError
from fedra_engine.runtime.randomness import SampleDraws

PREPROCESSOR_FILE = "preprocessor_config.json"
PROCESSOR_FILE = "processor_config.json"
"""Settings of a processor of images and texts, with those of images under `image_processor`."""
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
BYTE_TO_UNIT = 1 / 255
CROP_RATIOS = (3 / 4, 4 / 3)
"""Range of the aspect ratio, width over height, of a crop (arXiv 1409.4842, §6)."""
_TRIES = 10
"""Draws of a crop's area and aspect ratio; the first one that fits into the image is used."""


@dataclass(frozen=True)
class Preprocessing:
    """Image size, and the mean and standard deviation of each channel to normalise values in [0, 1] by."""

    image_size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        return self.channels, self.image_size, self.image_size


def preprocessing_for(
    model_path: str | None, model_config: Any, image_size: int | None = None, processor: Any = None
) -> Preprocessing:
    """The preprocessing that a model was trained with.

    It comes from the `processor` if there is one; else from the model's `preprocessor_config.json` or
    `processor_config.json`; else from timm's settings in `model_config`. Without any of these, the size is that of
    `model_config`, and the statistics are ImageNet's for three channels, and 0.5 for one or for a model without a path.

    Args:
        model_path: directory or hub name; None for a model in memory.
        model_config: the model's transformers configuration.
        image_size: side in pixels that replaces the model's own.
        processor: an image processor of transformers.

    Raises:
        InputError: the size is unknown, the model expects other than square images, or the settings of a hub model
            are neither in the cache nor can be downloaded.
    """
    channels = getattr(model_config, "num_channels", 3)
    if channels not in (1, 3):
        raise InputError(f"model.path: found a model of {channels} image channels, expected 1 or 3")
    if processor is not None:
        settings = _checked_settings(getattr(processor, "image_processor", processor).to_dict(), "processor")
    elif model_path is None:
        settings = {"image_mean": [0.5] * channels, "image_std": [0.5] * channels}
    else:
        settings = (
            _read_settings(model_path, PREPROCESSOR_FILE)
            or _read_settings(model_path, PROCESSOR_FILE, part="image_processor")
            or _timm_settings(model_config)
        )
    if image_size is None:
        image_size = _image_size(settings, model_config)
    mean, std = _statistics(settings, channels)
    return Preprocessing(image_size, channels, mean, std)


@dataclass(frozen=True)
class Augmentation:
    """A random resized crop, if there is a `crop_scale`, and a horizontal flip with probability 1/2.

    Attributes:
        crop_scale: minimum area of a crop as a fraction of the image's; None for no crop.
    """

    crop_scale: float | None

    def __call__(self, images: Tensor, draws: SampleDraws) -> Tensor:
        """Augment `images`, floating point [samples, channels, height, width]; the shape stays the same."""
        drawn = draws.uniform(1 if self.crop_scale is None else 3 + 2 * _TRIES)
        is_flipped = drawn[:, 0] < 0.5
        if self.crop_scale is None:
            flipped = copy_async(torch.from_numpy(is_flipped), images.device)
            return torch.where(flipped[:, None, None, None], images.flip(-1), images)
        width, height = _crop_sizes(drawn[:, 3:], self.crop_scale)
        # In affine_grid's coordinates, images range from -1 to 1 in both dimensions.
        maps = np.zeros((len(images), 2, 3))
        maps[:, 0, 0], maps[:, 1, 1] = np.where(is_flipped, -width, width), height
        maps[:, 0, 2] = (1 - width) * (2 * drawn[:, 1] - 1)
        maps[:, 1, 2] = (1 - height) * (2 * drawn[:, 2] - 1)
        grid = affine_grid(
            copy_async(torch.from_numpy(maps).to(images.dtype), images.device), list(images.shape), align_corners=False
        )
        return grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def make_augmentation(config: DataConfig) -> Augmentation | None:
    """The augmentation that `config.augmentation` names."""
    if config.augmentation == "none":
        return None
    return Augmentation(config.crop_scale if config.augmentation == "crop_flip" else None)


def _read_settings(model_path: str, file: str, part: str | None = None) -> dict[str, Any]:
    """The content of the model's `file`, or a `part` of it; empty if the model has no such file."""
    path = Path(model_path) / file
    if not Path(model_path).is_dir():
        try:
            path = Path(hf_hub_download(model_path, file))
        except LocalEntryNotFoundError as error:
            # A subclass of EntryNotFoundError, but about the cache and not about the model.
            if try_to_load_from_cache(model_path, file) is not _CACHED_NO_EXIST:
                raise InputError(
                    f"model.path: found no {file} of {model_path!r} in the cache and no connection to the hub, "
                    "expected one of them (or a model directory)"
                ) from error
        except EntryNotFoundError:
            pass
    if not path.exists():
        return {}
    try:
        settings = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path}: found no JSON ({error}), expected an image processor configuration") from error
    if not isinstance(settings, dict):
        raise InputError(f"{path}: found no JSON object, expected an image processor configuration")
    return _checked_settings(settings if part is None else settings.get(part) or {}, str(path))


def _checked_settings(settings: dict[str, Any], whose: str) -> dict[str, Any]:
    """The `settings` of an image processor that are not null; InputError unless they scale by 1/255."""
    settings = {name: value for name, value in settings.items() if value is not None}
    scale = settings.get("rescale_factor", BYTE_TO_UNIT)
    if not settings.get("do_rescale", True) or not _is_number(scale) or abs(scale - BYTE_TO_UNIT) > 1e-6:
        raise InputError(f"{whose}: found do_rescale off or rescale_factor {scale}, expected scaling by 1/255")
    return settings


def _timm_settings(model_config: Any) -> dict[str, Any]:
    """The settings of a timm model by the names of transformers; empty for other models."""
    known = getattr(model_config, "pretrained_cfg", None)
    if not known:
        return {}
    found = {"image_mean": known.get("mean"), "image_std": known.get("std")}
    settings: dict[str, Any] = {name: list(values) for name, values in found.items() if values is not None}
    if "input_size" in known:
        height, width = known["input_size"][1:]
        settings["size"] = {"height": height, "width": width}
    return settings


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _image_size(settings: dict[str, Any], model_config: Any) -> int:
    found = settings.get("crop_size") if settings.get("do_center_crop") else settings.get("size")
    if found is None:
        found = getattr(model_config, "image_size", None)
    if isinstance(found, dict):
        found = (found.get("height"), found.get("width")) if "height" in found else found.get("shortest_edge")
    if isinstance(found, list | tuple) and len(found) == 2 and found[0] == found[1]:
        found = found[0]
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise InputError(f"data.image_size: found null and a model of image size {found}, expected one side in pixels")
    return found


def _statistics(settings: dict[str, Any], channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if not settings.get("do_normalize", True):
        return (0.0,) * channels, (1.0,) * channels
    default_mean, default_std = (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else ((0.5,), (0.5,))
    mean, std = settings.get("image_mean", default_mean), settings.get("image_std", default_std)
    fit = all(
        isinstance(values, list | tuple) and len(values) == channels and all(map(_is_number, values))
        for values in (mean, std)
    )
    if not fit or min(std) <= 0:
        raise InputError(
            f"model.path: found image_mean {mean} and image_std {std} in the model's image processor configuration, "
            f"expected one value for each of the model's {channels} channels, and image_std above 0"
        )
    return tuple(mean), tuple(std)


def _crop_sizes(drawn: NDArray[np.float64], scale: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Width and height of crops as fractions of the image's, [samples] each, from uniform draws [samples, 2 · tries].

    Areas are uniform from `scale` to 1, ratios log-uniform in `CROP_RATIOS`; if no draw fits, the whole image is used.
    """
    areas = scale + (1 - scale) * drawn[:, :_TRIES]
    least, greatest = np.log(CROP_RATIOS)
    ratios = np.exp(least + (greatest - least) * drawn[:, _TRIES:])
    widths, heights = np.sqrt(areas * ratios), np.sqrt(areas / ratios)
    fits = (widths <= 1) & (heights <= 1)
    any_fits, chosen = fits.any(axis=1), (np.arange(len(drawn)), fits.argmax(axis=1))
    return np.where(any_fits, widths[chosen], 1.0), np.where(any_fits, heights[chosen], 1.0)


def precise_dtype(dtype: torch.dtype) -> torch.dtype:
    """In what images for a model in `dtype` are computed: half precision would round grey levels minus their mean."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def standardize(pixels: Tensor, preprocessing: Preprocessing, dtype: torch.dtype) -> Tensor:
    """Grey levels 0…255 [images, channels, height, width], normalised by mean and standard deviation, in `dtype`."""
    precise = precise_dtype(dtype)
    mean, std = _byte_statistics(preprocessing, pixels.device, precise)
    if pixels.device.type == "cpu":
        # In place: there, operations that also change the dtype take three times as long.
        return pixels.to(precise).sub_(mean).div_(std).to(dtype)
    # Two passes over memory instead of four.
    centered = torch.sub(pixels, mean)
    return torch.div(centered, std, out=centered.new_empty(centered.shape, dtype=dtype))


@lru_cache
def _byte_statistics(preprocessing: Preprocessing, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation in grey levels 0…255, [channels, 1, 1]."""
    mean = torch.tensor(preprocessing.mean, dtype=dtype, device=device) * 255
    std = torch.tensor(preprocessing.std, dtype=dtype, device=device) * 255
    return mean[:, None, None], std[:, None, None]
