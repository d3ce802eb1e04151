"""Try the model on an image of the size that images are resized to, before any is decoded."""

from __future__ import annotations

import logging
import math
import time

import numpy as np
import torch
from torch import Tensor

from fedra_engine.config import ExperimentConfig
from fedra_engine.data.domain_data import DomainData
from fedra_engine.data.preprocessing import Preprocessing
from fedra_engine.execution.head_init import SAMPLES_PER_CLASS
from fedra_engine.execution.memory import hidden_shape
from fedra_engine.models.batch_arguments import probe_batch_arguments
from fedra_engine.models.foundation import Foundation
from fedra_engine.runtime.tables import duration_text

_LONG = 60.0
"""A warning is given if the passes before the first round take more seconds than this."""
_FEW_TOKENS = 100
"""With at most so many tokens an image, a smaller one would hardly be faster, and a slow pass has other reasons."""
_LOG = logging.getLogger(__name__)


def check_image_size(foundation: Foundation, preprocessing: Preprocessing) -> None:
    """Raise InputError unless the model takes images of the size that they are resized to."""
    black = _black(foundation, preprocessing)
    probe_batch_arguments(
        foundation.model, foundation.blocks, lambda n: {"pixel_values": black.expand(n, *black.shape)}
    )


def warn_of_slow_images(
    config: ExperimentConfig, foundation: Foundation, preprocessing: Preprocessing, data: DomainData
) -> None:
    """Time the model on an image, and warn if the passes before the first round take long at the model's own size."""
    # On a GPU, one image says little about many.
    if config.data.image_size is not None or foundation.device.type != "cpu":
        return
    seconds, inputs = math.inf, {"pixel_values": _black(foundation, preprocessing)[None]}
    # One pass alone may be slow for other reasons.
    for _ in range(2):
        started = time.perf_counter()
        tokens = hidden_shape(foundation, inputs)[1]
        if tokens <= _FEW_TOKENS:
            return
        seconds = min(seconds, time.perf_counter() - started)
    samples = int(data.is_test.sum())
    if config.model.head_init == "class_means":
        assert data.labels is not None
        samples += sum(min(count, SAMPLES_PER_CLASS) for count in np.bincount(data.labels[~data.is_test]))
    if samples * seconds > _LONG:
        _LOG.warning("%s", _slow_images_text(preprocessing.image_size, tokens, seconds, samples))


def _black(foundation: Foundation, preprocessing: Preprocessing) -> Tensor:
    return torch.zeros(preprocessing.shape, device=foundation.device, dtype=foundation.dtype)


def _slow_images_text(pixels: int, tokens: int, seconds: float, samples: int) -> str:
    """The warning; `seconds` are those of an image."""
    return (
        f"data.image_size: at the model's own {pixels} pixels an image has {tokens:,} tokens and takes about "
        f"{duration_text(seconds)} here, so the {samples:,} samples before the first round take about "
        f"{duration_text(samples * seconds)}; a smaller data.image_size is faster"
    )
