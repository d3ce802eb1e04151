"""From encoded images to tensors ready to be gathered: decoded and resized once, ahead of training."""

from __future__ import annotations

import io
import json
import os
import struct
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from numpy.typing import NDArray
from PIL import Image as PillowImage

from fedra_engine.data.samples import Preprocessing, SampleStore
from fedra_engine.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

PREPROCESSOR_FILE = "preprocessor_config.json"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
BYTE_TO_UNIT = 1 / 255
MODES = {1: "L", 3: "RGB"}
"""Pillow's name of images with so many channels."""
UNREADABLE = (
    OSError,
    EOFError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    struct.error,
    PillowImage.DecompressionBombError,
)
"""What Pillow and its plugins raise on files that are no image, cut short or malformed."""


def preprocessing_for(model_path: str, model_config: Any, image_size: int | None = None) -> Preprocessing:
    """What the model at `model_path` (a directory or hub name) was trained with.

    Its `preprocessor_config.json` decides where there is one; else the size is that of `model_config`, and
    the statistics are ImageNet's for three channels and 0.5 for one.

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
    settings = _read_settings(model_path)
    if image_size is None:
        image_size = _image_size(settings, model_config)
    mean, std = _statistics(settings, channels)
    return Preprocessing(image_size, channels, mean, std)


def preprocess(data: Dataset, preprocessing: Preprocessing) -> SampleStore:
    """Decode and resize (bicubic) every image of `data`, features `image`, `label` and `domain`.

    Images that are files are decoded once: the result is kept in the datasets cache for as long as none of
    them changes.

    Raises:
        InputError: an image that cannot be read.
    """
    from datasets import Features, Image, List, Value

    encoded = data.select_columns("image").cast_column("image", Image(decode=False))
    shape = (preprocessing.channels, preprocessing.image_size, preprocessing.image_size)
    fingerprint, cache_file = _cache_entry(encoded, preprocessing)
    decoded = encoded.map(
        _decode_batch,
        fn_kwargs={"preprocessing": preprocessing},
        batched=True,
        batch_size=64,
        remove_columns="image",
        features=Features(pixels=List(Value("uint8"), length=int(np.prod(shape)))),
        new_fingerprint=fingerprint,
        cache_file_name=cache_file,
        desc="decoding images",
    )
    return SampleStore(
        torch.from_numpy(_column(decoded, "pixels", np.uint8).reshape(-1, *shape)),
        torch.from_numpy(_column(data, "label", np.int64)),
        torch.from_numpy(_column(data, "domain", np.int64)),
        preprocessing,
    )


def _read_settings(model_path: str) -> dict[str, Any]:
    path = Path(model_path) / PREPROCESSOR_FILE if Path(model_path).is_dir() else _download_settings(model_path)
    if path is None or not path.exists():
        return {}
    try:
        settings: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path}: found no JSON ({error}), expected an image processor configuration") from error
    scale = settings.get("rescale_factor", BYTE_TO_UNIT)
    if not settings.get("do_rescale", True) or abs(scale - BYTE_TO_UNIT) > 1e-6:
        raise InputError(f"{path}: found do_rescale off or rescale_factor {scale}, expected scaling by 1/255")
    return settings


def _download_settings(name: str) -> Path | None:
    """The settings file of the hub model `name`; None when the hub says, or once said, that there is none."""
    try:
        return Path(hf_hub_download(name, PREPROCESSOR_FILE))
    except LocalEntryNotFoundError as error:
        # A kind of EntryNotFoundError, but it tells of the cache and not of the model.
        if try_to_load_from_cache(name, PREPROCESSOR_FILE) is _CACHED_NO_EXIST:
            return None
        raise InputError(
            f"model.path: found no {PREPROCESSOR_FILE} of {name!r} in the cache and no connection to the hub, "
            "expected one of them (or a model directory)"
        ) from error
    except EntryNotFoundError:
        return None


def _image_size(settings: dict[str, Any], model_config: Any) -> int:
    found = settings.get("crop_size") if settings.get("do_center_crop") else settings.get("size")
    if found is None:
        found = getattr(model_config, "image_size", None)
    if isinstance(found, dict):
        found = (found.get("height"), found.get("width")) if "height" in found else found.get("shortest_edge")
    if isinstance(found, list | tuple) and len(found) == 2 and found[0] == found[1]:
        found = found[0]
    if not isinstance(found, int):
        raise InputError(f"data.image_size: found null and a model of image size {found}, expected one side in pixels")
    return found


def _statistics(settings: dict[str, Any], channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if not settings.get("do_normalize", True):
        return (0.0,) * channels, (1.0,) * channels
    default_mean, default_std = (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else ((0.5,), (0.5,))
    mean = tuple(settings.get("image_mean", default_mean))
    std = tuple(settings.get("image_std", default_std))
    if len(mean) != channels or len(std) != channels:
        raise InputError(
            f"{PREPROCESSOR_FILE}: found image_mean {list(mean)} and image_std {list(std)}, "
            f"expected one value for each of the model's {channels} channels"
        )
    return mean, std


def _cache_entry(encoded: Dataset, preprocessing: Preprocessing) -> tuple[str | None, str | None]:
    """Fingerprint and cache file of the decoded images; nothing where the images are not files."""
    import datasets
    from datasets.fingerprint import Hasher

    paths = [image["path"] for image in encoded["image"] if image["path"] is not None]
    if not paths:
        return None, None
    files = [_file_state(path) for path in paths]
    fingerprint = Hasher.hash((files, preprocessing, _decode_batch))
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "fedra_engine"
    folder.mkdir(parents=True, exist_ok=True)
    return fingerprint, str(folder / f"{fingerprint}.arrow")


def _file_state(path: str) -> tuple[str, int, int]:
    """Path, size and time of the last change of an image file."""
    try:
        state = os.stat(path)
    except OSError as error:
        raise _unreadable(path, error) from error
    return path, state.st_size, state.st_mtime_ns


def _unreadable(path: str, error: Exception) -> InputError:
    reason = str(error) or type(error).__name__
    return InputError(f"data.root: cannot read {path}: {reason}; expected an image file")


def _decode_batch(
    batch: Mapping[str, list[dict[str, Any]]], preprocessing: Preprocessing
) -> dict[str, NDArray[np.uint8]]:
    # Pillow decodes and resizes outside the interpreter's lock.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        images = list(pool.map(lambda image: _decode(image, preprocessing), batch["image"]))
    return {"pixels": np.stack(images).reshape(len(images), -1)}


def _decode(image: Mapping[str, Any], preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """One encoded image (its bytes, or else its path) as uint8 [channels, height, width]."""
    try:
        with PillowImage.open(io.BytesIO(image["bytes"]) if image["bytes"] else image["path"]) as opened:
            picture = opened.convert(MODES[preprocessing.channels])
    except UNREADABLE as error:
        raise _unreadable(image["path"], error) from error
    size = (preprocessing.image_size, preprocessing.image_size)
    if picture.size != size:
        picture = picture.resize(size, PillowImage.Resampling.BICUBIC)
    pixels = np.asarray(picture)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _column(data: Dataset, name: str, dtype: type[np.generic]) -> NDArray[Any]:
    """A column as one flat array."""
    chunks = data.with_format("arrow")[:][name].chunks
    parts = [(chunk.flatten() if chunk.type.num_fields else chunk).to_numpy() for chunk in chunks]
    return np.concatenate(parts).astype(dtype, copy=False) if parts else np.zeros(0, dtype)
