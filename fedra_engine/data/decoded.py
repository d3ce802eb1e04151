"""Images that are decoded and resized before they become a source's content, in memory: no cache and no data set."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedra_engine.data.images import UnreadableImageError, decode_image, decoding_threads
from fedra_engine.data.samples import Preprocessing
from fedra_engine.runtime.errors import InputError


class DecodedImages:
    """The `content` of a `DomainData` whose images are pixels already."""

    def __init__(self, pixels: NDArray[np.uint8]) -> None:
        """`pixels` is uint8 [samples, channels, height, width]."""
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def select(self, rows: NDArray[np.int64]) -> DecodedImages:
        """The images `rows`, copied."""
        return DecodedImages(self.pixels[rows])


def decode_files(paths: Sequence[str], preprocessing: Preprocessing) -> DecodedImages:
    """Decode and resize the image files `paths`.

    Raises:
        InputError: a file that cannot be read or decoded.
    """
    side = preprocessing.image_size
    pixels = np.empty((len(paths), preprocessing.channels, side, side), dtype=np.uint8)

    def decode(row: int) -> None:
        try:
            pixels[row] = decode_image({"path": paths[row]}, preprocessing)
        except (UnreadableImageError, OSError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"data.root: cannot read {paths[row]}: {reason}; expected a readable file") from error

    with decoding_threads() as pool:
        for _ in pool.map(decode, range(len(paths))):
            pass
    return DecodedImages(pixels)
