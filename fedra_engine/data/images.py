"""Decoding images into pixels of one size, one by one or for a whole source."""

from __future__ import annotations

import io
import os
import struct
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, ImageOps
from PIL import Image as PillowImage

from fedra_engine.data.cache import MadeRows, Part, RowMaker, make_rows
from fedra_engine.data.domain_data import DomainData
from fedra_engine.data.preprocessing import Preprocessing
from fedra_engine.runtime.errors import InputError
from fedra_engine.runtime.files import check_regular

if TYPE_CHECKING:
    from datasets import Dataset

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
"""What Pillow and its plugins raise on files that are not images, truncated or malformed."""
_NOT_READ = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"})
"""Formats that Pillow recognises but cannot read, or only by starting another program."""
_FORMAT = 3
"""Version of the decoding, part of every cache key; to be raised when the same files give other pixels."""
_AT_ONCE = 16
"""Encoded images that a thread holds in memory."""


class UnreadableImageError(Exception):
    """An image that cannot be decoded."""


@cache
def image_formats() -> tuple[str, ...]:
    """Pillow's names of the supported formats, in the order in which Pillow tries them."""
    PillowImage.init()
    return tuple(name for name in PillowImage.ID if name in PillowImage.OPEN and name not in _NOT_READ)


@cache
def image_suffixes() -> frozenset[str]:
    """Suffixes of the supported formats, in lower case."""
    return frozenset(suffix for suffix, name in PillowImage.registered_extensions().items() if name in image_formats())


def image_column(paths: Sequence[str]) -> Dataset:
    """A data set with the column `image`: files that are opened when they are needed."""
    from datasets import Dataset, Features, Image

    return Dataset.from_dict({"image": list(paths)}, features=Features(image=Image()))


@contextmanager
def decoding_threads() -> Iterator[ThreadPoolExecutor]:
    """Threads that decode images, as Pillow releases the interpreter's lock; Pillow's warnings are silenced inside."""
    with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count()) as pool:
        warnings.simplefilter("ignore")
        yield pool


def image_rows(data: DomainData, preprocessing: Preprocessing, *, skip: bool) -> MadeRows:
    """Decode and resize every image of `data`, or read it from the cache; resize grey images; take decoded ones as is.

    With `skip`, images that cannot be decoded are left black and noted in `skipped`.

    Returns:
        The column `pixels`, uint8 [samples, channels, height, width].

    Raises:
        InputError: a file cannot be read or, without `skip`, decoded; or decoded content has another shape.
    """
    if not isinstance(data.content, np.ndarray):
        return make_rows(data, _ImageMaker(data, preprocessing), skip=skip)
    if data.content.ndim == 3:
        fitted = [_fit(PillowImage.fromarray(image), preprocessing) for image in data.content]
        return MadeRows([Part({"pixels": np.stack(fitted)}, [])])
    found, expected = data.content.shape[1:], preprocessing.shape
    if found != expected:
        raise InputError(f"data.image_size: found decoded images of {found}, expected {expected}")
    return MadeRows([Part({"pixels": data.content}, [])])


def decode_image(image: Mapping[str, Any], preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """Decode the `bytes` of an image, or else the file at its `path`, turn it upright and resize it (bicubic).

    Returns:
        uint8 [channels, height, width].

    Raises:
        UnreadableImageError: it is not an image, or damaged.
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
            return _fit(_eight_bits(_upright(opened)), preprocessing)
    except UNREADABLE as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UnreadableImageError(str(error) or type(error).__name__) from error


def _fit(picture: PillowImage.Image, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """The pixels of a picture of 8 bits, in the size and with the channels that the model takes."""
    picture = picture.convert("L" if preprocessing.channels == 1 else "RGB")
    size = (preprocessing.image_size, preprocessing.image_size)
    if picture.size != size:
        picture = picture.resize(size, PillowImage.Resampling.BICUBIC)
    pixels = np.asarray(picture)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


class _ImageMaker(RowMaker):
    what = "decoding images"
    readable = "a readable file"

    def __init__(self, data: DomainData, preprocessing: Preprocessing) -> None:
        from datasets import Image

        self._data = data
        self._preprocessing = preprocessing
        encoded = cast("Dataset", data.content).cast_column("image", Image(decode=False))
        self._encoded = encoded.with_format("arrow")
        self.shapes = {"pixels": preprocessing.shape}
        self.row_bytes = int(np.prod(preprocessing.shape))

    def identity(self, start: int, stop: int) -> str | None:
        import pyarrow.compute as pc

        # Column by column: the encoded images themselves stay unread.
        images = self._encoded[start:stop]["image"]
        stored = pc.struct_field(images, "bytes").is_valid().to_pylist()
        paths = pc.struct_field(images, "path").to_pylist()
        files: list[tuple[str, int, int] | None] = []
        for row, path, inside in zip(range(start, stop), paths, stored, strict=True):
            if path is None or inside:
                files.append(None)
                continue
            with self._opening(row):
                state = os.stat(path)
            files.append((os.path.abspath(path), state.st_size, state.st_mtime_ns))
        sources = self._data.sample_sources
        if not any(stored):
            made_of: object = files
        elif self._data.fingerprint is not None and sources is not None:
            # By their rows in the data set, which stay the same whichever domains are chosen.
            made_of = (self._data.fingerprint, sources[start:stop].tolist(), files)
        else:
            # Generated images.
            return None
        return repr((_FORMAT, "image", self._preprocessing.channels, self._preprocessing.image_size, made_of))

    def make(self, start: int, stop: int, done: Callable[[int], object]) -> Part:
        pixels = np.zeros((stop - start, *self._preprocessing.shape), dtype=np.uint8)

        def decode(first: int) -> list[str]:
            images = self._images(first, min(first + _AT_ONCE, stop))
            errors = [""] * len(images)
            for index, image in enumerate(images):
                try:
                    with self._opening(first + index):
                        pixels[first + index - start] = decode_image(image, self._preprocessing)
                except UnreadableImageError as error:
                    errors[index] = str(error)
            done(len(errors))
            return errors

        with decoding_threads() as pool:
            errors = [error for chunk in pool.map(decode, range(start, stop, _AT_ONCE)) for error in chunk]
        return Part({"pixels": pixels}, errors)

    def describe(self, row: int) -> str:
        path = self._images(row, row + 1)[0].get("path")
        place = self._data.describe(row, "image")
        if not path:
            return place
        return path if self._data.sample_sources is None else f"{path} ({place})"

    def _images(self, start: int, stop: int) -> list[dict[str, Any]]:
        """`bytes` and `path` of each image; empty for a missing one."""
        return [image or {} for image in self._encoded[start:stop]["image"].to_pylist()]

    @contextmanager
    def _opening(self, row: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(
                f"{self._data.given_as}: cannot read {self.describe(row)}: {error.strerror}; expected an image file"
            ) from error


def _upright(picture: PillowImage.Image) -> PillowImage.Image:
    """Apply the EXIF orientation."""
    try:
        orientation = picture.getexif().get(ExifTags.Base.Orientation)
    except UNREADABLE:
        # Damaged metadata does not concern the pixels.
        return picture
    return picture if orientation is None else ImageOps.exif_transpose(picture)


def _eight_bits(picture: PillowImage.Image) -> PillowImage.Image:
    """Scale 16-bit and floating-point grey levels to 8 bits; Pillow's own conversion would clip them.

    Floating-point levels range from 0 to 1 if none is greater, else from 0 to 255.
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
