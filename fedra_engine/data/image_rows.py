"""The pixels of all images of a source, decoded once and kept on disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from fedra_engine.data.decoded import DecodedImages
from fedra_engine.data.domain_data import DomainData
from fedra_engine.data.images import UnreadableImageError, decode_image, decoding_threads
from fedra_engine.data.row_cache import Part, as_tensor
from fedra_engine.data.row_parts import MadeRows, RowMaker, make_rows
from fedra_engine.data.samples import Preprocessing
from fedra_engine.data.stored_rows import StoredRows
from fedra_engine.runtime.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

_FORMAT = 3
"""Goes up whenever the same files would give other pixels."""

_AT_ONCE = 16
"""Encoded images that a thread holds in memory."""


def image_rows(data: DomainData, preprocessing: Preprocessing, *, skip: bool) -> tuple[StoredRows, MadeRows]:
    """Decode and resize every image of `data`, or find it done: in the cache, or where its content is pixels already.

    Args:
        data: samples with `image` content.
        preprocessing: size and channels.
        skip: leave images that cannot be decoded black and note that, instead of raising.

    Returns:
        uint8 rows [samples, channels, height, width], and how they came about.

    Raises:
        InputError: a file that cannot be read or, without `skip`, decoded; or pixels of another shape.
    """
    if isinstance(data.content, DecodedImages):
        return _decoded_rows(data.content, preprocessing), MadeRows([], {}, None)
    rows = make_rows(data, _ImageMaker(data, preprocessing), skip=skip)
    return StoredRows.of_parts(rows.parts, "pixels"), rows


def _decoded_rows(images: DecodedImages, preprocessing: Preprocessing) -> StoredRows:
    shape = (preprocessing.channels, preprocessing.image_size, preprocessing.image_size)
    if images.pixels.shape[1:] != shape:
        raise InputError(f"data.image_size: found decoded images of {images.pixels.shape[1:]}, expected {shape}")
    return StoredRows([as_tensor(images.pixels)])


class _ImageMaker(RowMaker):
    """Makes rows of pixels."""

    what = "decoding images"
    readable = "a readable file"

    def __init__(self, data: DomainData, preprocessing: Preprocessing) -> None:
        from datasets import Image

        self._data = data
        self._preprocessing = preprocessing
        encoded = cast("Dataset", data.content).cast_column("image", Image(decode=False))
        self._encoded = encoded.with_format("arrow")
        self.shapes = {"pixels": (preprocessing.channels, preprocessing.image_size, preprocessing.image_size)}
        self.row_bytes = int(np.prod(self.shapes["pixels"]))

    def identity(self, start: int, stop: int) -> str | None:
        import pyarrow.compute as pc

        # Column by column: the encoded images themselves stay unread.
        images = self._encoded[start:stop]["image"]
        stored = pc.struct_field(images, "bytes").is_valid().to_pylist()
        paths = pc.struct_field(images, "path").to_pylist()
        files = [
            None if path is None or inside else self._state(path, start + offset)
            for offset, (path, inside) in enumerate(zip(paths, stored, strict=True))
        ]
        if not any(stored):
            made_of: object = files
        elif self._data.fingerprint is not None and self._data.origins is not None:
            # As rows of the data set, whichever of its domains are chosen.
            made_of = (self._data.fingerprint, list(map(tuple, self._data.origins[start:stop])), files)
        else:
            # The source made these images up; it can do so again.
            return None
        return repr((_FORMAT, "image", self._preprocessing.channels, self._preprocessing.image_size, made_of))

    def make(self, start: int, stop: int, done: Callable[[int], object]) -> Part:
        pixels = np.zeros((stop - start, *self.shapes["pixels"]), dtype=np.uint8)

        def decode(first: int) -> list[str]:
            images = self._images(first, min(first + _AT_ONCE, stop))
            rows = range(first, first + len(images))
            errors = [self._decode(image, pixels[row - start], row) for row, image in zip(rows, images, strict=True)]
            done(len(errors))
            return errors

        with decoding_threads() as pool:
            errors = [error for some in pool.map(decode, range(start, stop, _AT_ONCE)) for error in some]
        return Part({"pixels": pixels}, errors)

    def describe(self, row: int) -> str:
        path = self._images(row, row + 1)[0].get("path")
        origin = None if self._data.origins is None else str(self._data.origins[row])
        if path and origin:
            return f"{path} ({origin})"
        return path or origin or f"image {row}"

    def _decode(self, image: Mapping[str, Any], pixels: NDArray[np.uint8], row: int) -> str:
        """Put `image`, that of sample `row`, into `pixels`; returns what is wrong with it."""
        try:
            pixels[...] = decode_image(image, self._preprocessing)
        except UnreadableImageError as error:
            return str(error)
        except OSError as error:
            raise self._unopened(row, error) from error
        return ""

    def _images(self, start: int, stop: int) -> list[dict[str, Any]]:
        """`bytes` and `path` of each; nothing of one that is missing."""
        return [image or {} for image in self._encoded[start:stop]["image"].to_pylist()]

    def _state(self, path: str, row: int) -> tuple[str, int, int]:
        """Path, size in bytes and time of the last change in nanoseconds of a file."""
        try:
            state = os.stat(path)
        except OSError as error:
            raise self._unopened(row, error) from error
        return os.path.abspath(path), state.st_size, state.st_mtime_ns

    def _unopened(self, row: int, error: OSError) -> InputError:
        return InputError(f"data.root: cannot read {self.describe(row)}: {error.strerror}; expected an image file")
