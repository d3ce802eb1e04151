"""Losses multiplied before the backward pass, so that small gradients survive float16 (arXiv 1710.03740, §3.2)."""

from __future__ import annotations

import torch

FLOAT16_SCALE = 2.0**10
"""Keeps gradients of activations from 6e-11 (float16 alone: 6e-8) up to 64. A power of two, which rounds nothing."""


def loss_scale(dtype: torch.dtype) -> float:
    """The factor of losses of a model in `dtype`; the gradients of what is trained are divided by it again."""
    return FLOAT16_SCALE if dtype == torch.float16 else 1.0
