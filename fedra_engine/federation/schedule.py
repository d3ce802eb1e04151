"""The learning rate over the rounds."""

from __future__ import annotations

import math

from fedra_engine.config import TrainingConfig


def learning_rate(training: TrainingConfig, round: int, rounds: int) -> float:
    """The learning rate of `round`; `linear` and `cosine` fall from `lr` towards 0 after the last round."""
    progress = round / rounds
    factor = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[training.lr_schedule]
    return training.lr * factor
