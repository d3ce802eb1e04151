"""Trains the foundation model of the embedded experiment on clean digits that the federation never sees.

python launchers/pretrain.py --output_dir FOLDER

The result is a plain Hugging Face ViT, trained at full depth. With stochastic depth, sub-models of a few blocks would
already classify well, and missing blocks would cost federated methods little.
"""

from __future__ import annotations

import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedra_engine.runtime.exit_codes import end, exit_code, watch_signals

if __name__ == "__main__":
    # What is imported next takes seconds.
    watch_signals()

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedra_engine.callbacks.run_folder import make_folder
from fedra_engine.config.options import PATH, number, option, whole
from fedra_engine.config.parsing import Parser, quiet_libraries
from fedra_engine.config.validation import check_values
from fedra_engine.data.sources.digits import digits_dataset
from fedra_engine.runtime.errors import InputError
from fedra_engine.runtime.files import check_unused, whole_files

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import ViTForImageClassification

PIXEL_MEAN = 0.5
PIXEL_STD = 0.5
SIDE = 8
"""Of the images, in pixels."""


@dataclass(frozen=True)
class Options:
    """How the model is trained.

    Args:
        output_dir: new or empty folder that becomes the model directory.
        seed: seed of the initial weights, the batches and the augmentation.
        blocks: transformer blocks.
        hidden_size: features of a token.
        mlp_size: hidden features of a block's MLP.
        heads: attention heads.
        patch_size: side of a patch in pixels.
        epochs: passes over the training images.
        batch_size: images in a step.
        lr: learning rate after warm-up, decayed to 0 along a cosine.
        weight_decay: AdamW's decoupled decay.
        rotation: largest random rotation, in degrees.
        zoom: largest random change of size, as a fraction.
        shift: largest random shift, in pixels.
        noise: largest standard deviation of the Gaussian noise on an image, in grey levels.
    """

    output_dir: str = option("runs/digits_vit", PATH)
    seed: int = option(0, whole(0, 2**32 - 1))
    blocks: int = option(12, whole(1, 1000))
    hidden_size: int = option(64, whole(1, 10_000))
    mlp_size: int = option(128, whole(1, 100_000))
    heads: int = option(4, whole(1, 1000))
    patch_size: int = option(4, whole(1, SIDE))
    epochs: int = option(300, whole(1, 1_000_000))
    batch_size: int = option(32, whole(1, 100_000))
    lr: float = option(2e-3, number(0, 100, above=True))
    weight_decay: float = option(0.05, number(0, 1000))
    rotation: float = option(15.0, number(0, 180))
    zoom: float = option(0.15, number(0, 0.9))
    shift: float = option(0.8, number(0, SIDE))
    noise: float = option(0.3, number(0, 100))


def check_options(options: Options) -> None:
    """Raises InputError for the first of the options that no model can be trained with."""
    check_values(options)
    for name, size, of in (("heads", options.hidden_size, "hidden_size"), ("patch_size", SIDE, "the images' side")):
        if size % (value := getattr(options, name)):
            raise InputError(f"{name}: found {value}, expected a divisor of {of}, {size}")


def build_model(options: Options) -> ViTForImageClassification:
    """A ViT for 8 × 8 grey images."""
    from transformers import ViTConfig, ViTForImageClassification

    names = [str(digit) for digit in range(10)]
    config = ViTConfig(
        num_hidden_layers=options.blocks,
        hidden_size=options.hidden_size,
        intermediate_size=options.mlp_size,
        num_attention_heads=options.heads,
        image_size=SIDE,
        patch_size=options.patch_size,
        num_channels=1,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
    )
    return ViTForImageClassification(config)


def augment(images: Tensor, options: Options, rng: torch.Generator) -> Tensor:
    """A random small rotation, zoom and shift of each image [images, 1, 8, 8], then noise of random strength."""

    def uniform(limit: float) -> Tensor:
        return limit * (2 * torch.rand(len(images), generator=rng) - 1)

    angle, scale = torch.deg2rad(uniform(options.rotation)), 1 + uniform(options.zoom)
    pixel = 2 / images.shape[-1]
    rows = [
        torch.stack([scale * angle.cos(), -scale * angle.sin(), pixel * uniform(options.shift)], dim=1),
        torch.stack([scale * angle.sin(), scale * angle.cos(), pixel * uniform(options.shift)], dim=1),
    ]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, align_corners=False)
    strength = options.noise * torch.rand(len(images), 1, 1, 1, generator=rng)
    return moved + strength * torch.randn(images.shape, generator=rng)


def normalise(images: Tensor) -> Tensor:
    """Grey levels in [0, 1] as the model expects them."""
    return (images - PIXEL_MEAN) / PIXEL_STD


def to_tensors(data: Dataset) -> tuple[Tensor, Tensor]:
    """Grey levels [images, 1, 8, 8] in [0, 1] and labels [images]."""
    pixels = np.stack([np.asarray(image) for image in data["image"]])
    return torch.from_numpy(pixels).unsqueeze(1) / 255, torch.tensor(list(data["label"]))


def learning_rate(step: int, steps: int, options: Options) -> float:
    """Linear warm-up over the first tenth of the steps, then a cosine to 0."""
    warm_up = steps / 10
    if step < warm_up:
        return options.lr * (step + 1) / warm_up
    return options.lr * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up)))


def train(model: ViTForImageClassification, images: Tensor, labels: Tensor, options: Options) -> None:
    """Trains on every image once an epoch."""
    rng = torch.Generator().manual_seed(options.seed)
    steps = options.epochs * math.ceil(len(images) / options.batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=options.weight_decay)
    model.train()
    step = 0
    for epoch in range(options.epochs):
        total = 0.0
        for rows in torch.randperm(len(images), generator=rng).split(options.batch_size):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, options)
            logits = model(pixel_values=normalise(augment(images[rows], options, rng))).logits
            loss = F.cross_entropy(logits, labels[rows])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            total += loss.item() * len(rows)
            step += 1
        if (epoch + 1) % 20 == 0:
            print(f"epoch {epoch + 1:4d}/{options.epochs}  loss {total / len(images):.4f}", flush=True)


@torch.no_grad()
def accuracy(model: ViTForImageClassification, images: Tensor, labels: Tensor) -> float:
    """Share of images [images, 1, 8, 8] whose class the whole model finds."""
    model.eval()
    return (model(pixel_values=normalise(images)).logits.argmax(1) == labels).float().mean().item()


def model_card(options: Options, command: str, training_images: int, held_out_images: int, top1: float) -> str:
    """The README.md of the model directory."""
    return f"""---
library_name: transformers
pipeline_tag: image-classification
tags: [vit, digits]
---

# digits_vit

A Vision Transformer for the 8 × 8 grey handwritten digits of scikit-learn: the frozen foundation model of
fedra-engine's embedded experiment. {options.blocks} blocks of {options.hidden_size} features, {options.heads} heads,
MLP of {options.mlp_size}; patches of {options.patch_size} × {options.patch_size} pixels.

| | |
|---|---|
| top-1 on {held_out_images} held-out clean digits | **{top1:.4f}** |
| training images | {training_images} clean digits, none of which the federation trains or is tested on |
| input | grey levels in [0, 1], minus {PIXEL_MEAN}, divided by {PIXEL_STD} |

Every training batch passed all blocks, as is usual: nothing prepared the model for missing blocks.

The model was made by

```
{command}
```

Data: E. Alpaydin and C. Kaynak, *Optical Recognition of Handwritten Digits*, UCI Machine Learning Repository, 1998
(CC BY 4.0), as distributed with scikit-learn.
"""


def save(model: ViTForImageClassification, folder: Path, card: str) -> None:
    """Writes a model directory: weights, configuration, image processor and model card."""
    from transformers import ViTImageProcessorPil

    side = model.config.image_size
    processor = ViTImageProcessorPil(
        size={"height": side, "width": side}, image_mean=[PIXEL_MEAN], image_std=[PIXEL_STD]
    )
    with whole_files(folder) as made:
        model.save_pretrained(made)
        processor.save_pretrained(made)
        (made / "README.md").write_text(card, encoding="utf-8")


def command_of(options: Options) -> str:
    """The command that repeats the training, every option spelled out."""
    return " ".join(["python launchers/pretrain.py", *(f"--{name} {value}" for name, value in asdict(options).items())])


def main() -> None:
    """Train and save the model that the command line describes.

    Raises:
        InputError: the options cannot be used.
    """
    options = Parser(Options, "Trains the foundation model of the embedded experiment.").parse(sys.argv[1:])
    quiet_libraries()
    folder = Path(options.output_dir)
    check_options(options)
    check_unused("output_dir", folder)
    make_folder(folder)
    torch.manual_seed(options.seed)
    torch.set_num_threads(1)
    training, held_out = (to_tensors(digits_dataset([part])) for part in ("pretraining", "held_out"))
    model = build_model(options)
    train(model, *training, options)
    top1 = accuracy(model, *held_out)
    print(f"top-1 on {len(held_out[1])} held-out clean digits: {top1:.4f}")
    save(model, folder, model_card(options, command_of(options), len(training[1]), len(held_out[1]), top1))


if __name__ == "__main__":
    end(exit_code(main))
