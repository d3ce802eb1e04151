"""Images as samples."""

from __future__ import annotations

import torch

from fedra_engine.data.domain_data import DomainData
from fedra_engine.data.images import image_rows
from fedra_engine.data.preprocessing import Preprocessing
from fedra_engine.data.samples import ImageSamples, StoredRows


def preprocess(data: DomainData, preprocessing: Preprocessing) -> ImageSamples:
    """Decode and resize (bicubic) every image of `data`, or find it done in the cache.

    Raises:
        InputError: an image that cannot be read.
    """
    assert data.labels is not None
    pixels = StoredRows.of_parts(image_rows(data, preprocessing, skip=False).parts, "pixels")
    return ImageSamples(pixels, torch.from_numpy(data.labels), torch.from_numpy(data.domain_of), preprocessing)
