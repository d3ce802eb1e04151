"""Try the model on an image of the size that images are resized to, before any is decoded."""

from __future__ import annotations

import logging
import math
import time

import numpy as np
import torch

from fedra_engine.config import ExperimentConfig
from fedra_engine.data.domain_data import DomainData
from fedra_engine.data.preprocessing import Preprocessing
from fedra_engine.execution.head_init import SAMPLES_PER_CLASS
from fedra_engine.execution.memory import hidden_shape
from fedra_engine.models.batch_arguments import probe_batch_arguments
from fedra_engine.models.foundation import Foundation

_LONG = 60.0
"""A warning is given if the passes before the first round take more seconds than this."""
_LOG = logging.getLogger(__name__)


def check_image_size(
    config: ExperimentConfig, foundation: Foundation, preprocessing: Preprocessing, data: DomainData
) -> None:
    """Raise InputError unless the model takes images of the size they are resized to; warn if it makes passes slow."""
    size = preprocessing.shape
    black = torch.zeros(size, device=foundation.device, dtype=foundation.dtype)
    probe_batch_arguments(foundation.model, foundation.blocks, lambda n: {"pixel_values": black.expand(n, *size)})
    # On a GPU, one image says little about many.
    if config.data.image_size is None and foundation.device.type == "cpu":
        seconds = math.inf
        # One pass alone may be slow for other reasons.
        for _ in range(2):
            started = time.perf_counter()
            tokens = hidden_shape(foundation, {"pixel_values": black[None]})[1]
            seconds = min(seconds, time.perf_counter() - started)
        samples = int(data.is_test.sum())
        if config.model.head_init == "class_means":
            assert data.labels is not None
            samples += sum(min(count, SAMPLES_PER_CLASS) for count in np.bincount(data.labels[~data.is_test]))
        if samples * seconds > _LONG:
            _LOG.warning(
                "data.image_size: the model's own %d pixels are %s tokens an image and about %.2g s a pass here, so "
                "about %.2g minutes for %s samples before the first round; a smaller data.image_size is faster",
                *(preprocessing.image_size, f"{tokens:,}", seconds, samples * seconds / 60, f"{samples:,}"),
            )
