"""Small images of four domains, a tiny DINOv2 of random weights, and a study that both fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import Dinov2Config, Dinov2Model

from benchmarks.accuracy.setting import StudySetting

SETTING = StudySetting(
    capacities=(6, 4, 3, 3),
    rounds=4,
    slice=2,
    seeds=(0,),
    image_size=8,
    batch_size=4,
    rank=2,
)


def make_images(root: Path) -> Path:
    """Five images for each of two classes in each of four domains; classes differ in brightness."""
    rng = np.random.default_rng(0)
    for domain in ("art", "cartoon", "photo", "sketch"):
        for label, name in enumerate(("cat", "dog")):
            folder = root / domain / name
            folder.mkdir(parents=True)
            for index in range(5):
                pixels = rng.integers(100 * label, 156 + 100 * label, size=(11, 9, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return root


def make_model(folder: Path) -> Path:
    """In half precision, as such checkpoints are published."""
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=6, num_attention_heads=2, mlp_ratio=2, image_size=12, patch_size=4
    )
    Dinov2Model(config).half().save_pretrained(folder)
    return folder
