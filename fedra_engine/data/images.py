"""Images: columns of files, and decoding them into bytes of one size."""

from __future__ import annotations

import io
import os
import struct
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, ImageOps
from PIL import Image as PillowImage

from fedra_engine.data.samples import Preprocessing
from fedra_engine.runtime.files import check_regular

if TYPE_CHECKING:
    from datasets import Dataset

MODES = {1: "L", 3: "RGB"}
"""Pillow's name of images by their number of channels."""
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
_NOT_READ = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"})
"""Formats of which Pillow knows the name alone, or starts another program to read them."""


class UnreadableImageError(Exception):
    """An image that cannot be decoded."""


@cache
def image_formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are read, in the order in which Pillow tries them."""
    PillowImage.init()
    return tuple(name for name in PillowImage.ID if name in PillowImage.OPEN and name not in _NOT_READ)


@cache
def image_suffixes() -> frozenset[str]:
    """Suffixes, in small letters, of the files that are read."""
    return frozenset(suffix for suffix, name in PillowImage.registered_extensions().items() if name in image_formats())


def image_column(paths: Sequence[str]) -> Dataset:
    """A data set of the feature `image`, encoded files that are opened when they are needed."""
    from datasets import Dataset, Features, Image

    return Dataset.from_dict({"image": list(paths)}, features=Features(image=Image()))


@contextmanager
def decoding_threads() -> Iterator[ThreadPoolExecutor]:
    """Threads to decode images in: Pillow decodes and resizes outside the interpreter's lock.

    They keep to themselves what Pillow finds odd in files that it can decode.
    """
    with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count()) as pool:
        warnings.simplefilter("ignore")
        yield pool


def decode_image(image: Mapping[str, Any], preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """Decode, turn upright and resize (bicubic) an encoded image, its `bytes` or else its `path`.

    Returns:
        uint8 [channels, height, width].

    Raises:
        UnreadableImageError: it is no image, or damaged.
        OSError: the file cannot be opened at all.
    """
    data = image.get("bytes")
    source = image.get("path") if data is None else io.BytesIO(data)
    if source is None:
        raise UnreadableImageError("there is no image")
    try:
        if not isinstance(source, io.BytesIO):
            check_regular(source)
        with PillowImage.open(source, formats=image_formats()) as opened:
            picture = _eight_bits(_upright(opened)).convert(MODES[preprocessing.channels])
    except UNREADABLE as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UnreadableImageError(str(error) or type(error).__name__) from error
    size = (preprocessing.image_size, preprocessing.image_size)
    if picture.size != size:
        picture = picture.resize(size, PillowImage.Resampling.BICUBIC)
    pixels = np.asarray(picture)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _upright(picture: PillowImage.Image) -> PillowImage.Image:
    """The image as a viewer shows it, which may not be the way the camera was held."""
    try:
        orientation = picture.getexif().get(ExifTags.Base.Orientation)
    except UNREADABLE:
        # What else is wrong in the camera's notes does not concern the pixels.
        return picture
    return picture if orientation is None else ImageOps.exif_transpose(picture)


def _eight_bits(picture: PillowImage.Image) -> PillowImage.Image:
    """Grey levels of 16 bits and fractions scaled to 8 bits; Pillow's own conversion would cut them off.

    Fractions are from 0 to 1 where none is greater, else from 0 to 255.
    """
    if picture.mode == "F":
        levels = np.asarray(picture)
        if not 0 <= levels.min(initial=0) <= levels.max(initial=0) <= 255:
            raise UnreadableImageError("its grey levels are fractions outside 0 to 255")
        scale = 255 if levels.max(initial=0) <= 1 else 1
        return PillowImage.fromarray(np.rint(levels * scale).astype(np.uint8))
    if not picture.mode.startswith("I"):
        return picture
    levels = np.asarray(picture)
    if picture.mode == "I" and levels.max(initial=0) <= 255:
        return picture
    return PillowImage.fromarray((levels.clip(0, 65535) // 257).astype(np.uint8))
