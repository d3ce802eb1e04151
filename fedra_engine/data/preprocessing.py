"""What images must be for a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from fedra_engine.data.samples import Preprocessing
from fedra_engine.runtime.errors import InputError

PREPROCESSOR_FILE = "preprocessor_config.json"
PROCESSOR_FILE = "processor_config.json"
"""Has the settings of a processor of images and texts; those of the images under `image_processor`."""
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
BYTE_TO_UNIT = 1 / 255


def preprocessing_for(model_path: str, model_config: Any, image_size: int | None = None) -> Preprocessing:
    """What the model at `model_path` (a directory or hub name) was trained with.

    Its `preprocessor_config.json` or `processor_config.json` decides where there is one, else what timm keeps in
    `model_config`; else the size is that of `model_config`, and the statistics are ImageNet's for three channels and
    0.5 for one.

    Args:
        model_path: directory or hub name.
        model_config: the model's transformers configuration.
        image_size: side in pixels that replaces the model's own.

    Raises:
        InputError: the size is not known, the model wants something other than square images, or the settings of
            a hub model can be neither downloaded nor found in the cache.
    """
    channels = getattr(model_config, "num_channels", 3)
    if channels not in (1, 3):
        raise InputError(f"model.path: found a model of {channels} image channels, expected 1 or 3")
    settings = (
        _read_settings(model_path, PREPROCESSOR_FILE)
        or _read_settings(model_path, PROCESSOR_FILE, part="image_processor")
        or _timm_settings(model_config)
    )
    if image_size is None:
        image_size = _image_size(settings, model_config)
    mean, std = _statistics(settings, channels)
    return Preprocessing(image_size, channels, mean, std)


def _read_settings(model_path: str, file: str, part: str | None = None) -> dict[str, Any]:
    """The content of the model's `file`, or a `part` of it; empty if there is none."""
    path = Path(model_path) / file if Path(model_path).is_dir() else _download_settings(model_path, file)
    if path is None or not path.exists():
        return {}
    try:
        settings = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path}: found no JSON ({error}), expected an image processor configuration") from error
    if not isinstance(settings, dict):
        raise InputError(f"{path}: found no JSON object, expected an image processor configuration")
    if part is not None:
        settings = settings.get(part) or {}
    # null stands for what is usual.
    settings = {name: value for name, value in settings.items() if value is not None}
    scale = settings.get("rescale_factor", BYTE_TO_UNIT)
    if not settings.get("do_rescale", True) or not _is_number(scale) or abs(scale - BYTE_TO_UNIT) > 1e-6:
        raise InputError(f"{path}: found do_rescale off or rescale_factor {scale}, expected scaling by 1/255")
    found: dict[str, Any] = settings
    return found


def _timm_settings(model_config: Any) -> dict[str, Any]:
    """The settings of a timm model under the names that transformers gives them; nothing of another model."""
    known = getattr(model_config, "pretrained_cfg", None)
    if not known:
        return {}
    found = {"image_mean": known.get("mean"), "image_std": known.get("std")}
    settings: dict[str, Any] = {name: list(values) for name, values in found.items() if values is not None}
    if "input_size" in known:
        height, width = known["input_size"][1:]
        settings["size"] = {"height": height, "width": width}
    return settings


def _download_settings(name: str, file: str) -> Path | None:
    """The settings `file` of the hub model `name`; None when the hub has, or once had, no such file."""
    try:
        return Path(hf_hub_download(name, file))
    except LocalEntryNotFoundError as error:
        # A kind of EntryNotFoundError, but it is about the cache and not about the model.
        if try_to_load_from_cache(name, file) is _CACHED_NO_EXIST:
            return None
        raise InputError(
            f"model.path: found no {file} of {name!r} in the cache and no connection to the hub, "
            "expected one of them (or a model directory)"
        ) from error
    except EntryNotFoundError:
        return None


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
