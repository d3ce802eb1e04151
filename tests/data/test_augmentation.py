"""Training images change at random, as the draws say and whoever shares the batch."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fedra_engine.config import DataConfig
from fedra_engine.data.domain_data import DomainData
from fedra_engine.data.preprocessing import CROP_RATIOS, Augmentation, Preprocessing, make_augmentation
from fedra_engine.data.samples import ImageSamples, StoredRows, prepare
from fedra_engine.data.sources import load_source
from fedra_engine.runtime.errors import InputError
from fedra_engine.runtime.randomness import SampleDraws
from tests.data.tokenizers import save_encoder_tokenizer

COUNT = 400
FLIP, CROP = Augmentation(None), Augmentation(0.2)
MODEL = type("Config", (), {"num_channels": 3, "model_type": "vit"})


def draws(sizes: list[int], clients: list[int] | None = None, step: int = 0, round: int = 0) -> SampleDraws:
    clients = list(range(len(sizes))) if clients is None else clients
    return SampleDraws(7, round, clients, [step] * len(sizes), sizes)


def ramps(size: int = 16) -> torch.Tensor:
    """Images [COUNT, 2, size, size] of which a channel is each pixel's x and the other its y, from -1 to 1."""
    x = (2 * torch.arange(size, dtype=torch.float64) + 1) / size - 1
    return torch.stack([x.expand(size, size), x[:, None].expand(size, size)]).repeat(COUNT, 1, 1, 1)


def boxes(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What part of a ramp an augmented one shows, away from the border: centres and sizes (x, y), [COUNT, 2]."""
    step = images[:, 0, 8, 8] - images[:, 0, 8, 7], images[:, 1, 8, 8] - images[:, 1, 7, 8]
    centre = images[:, :, 7:9, 7:9].mean((2, 3))
    return centre, 8 * torch.stack(step, 1)


def test_half_of_the_images_are_flipped() -> None:
    images = torch.rand(COUNT, 3, 4, 4)
    found = FLIP(images, draws([COUNT]))
    is_flipped = (found == images.flip(3)).flatten(1).all(1)
    assert torch.equal(found, torch.where(is_flipped[:, None, None, None], images.flip(3), images))
    # 400 draws: the share has a standard deviation of 0.025.
    assert abs(float(is_flipped.double().mean()) - 0.5) < 0.1


def test_crops_are_boxes_inside_the_image_resized_to_it() -> None:
    found = CROP(ramps(), draws([COUNT]))
    centre, size = boxes(found)
    assert (size[:, 0] < 0).double().mean().sub(0.5).abs() < 0.1
    size = size.abs()
    assert (centre.abs() + size <= 1 + 1e-9).all()
    area, ratio = size.prod(1), size[:, 0] / size[:, 1]
    assert area.min() >= CROP.crop_scale
    assert area.min() < 0.25
    assert area.max() > 0.9
    assert abs(float(area.mean()) - 0.58) < 0.05
    inside = area < 1 - 1e-9
    assert ratio[inside].min() >= CROP_RATIOS[0] - 1e-9
    assert ratio[inside].max() <= CROP_RATIOS[1] + 1e-9
    # Bilinear interpolation of a ramp is a ramp, but for the half of a pixel along the border.
    x = (2 * torch.arange(16, dtype=torch.float64) + 1) / 16 - 1
    expected = (centre[:, 1, None] + size[:, 1, None] * x).clamp(-15 / 16, 15 / 16)
    torch.testing.assert_close(found[:, 1], expected[:, :, None].expand_as(found[:, 1]), rtol=0, atol=1e-12)


def test_the_whole_image_stands_in_where_no_crop_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    # The largest area and the greatest ratio make a crop that is wider than the image.
    monkeypatch.setattr(SampleDraws, "uniform", lambda self, count: np.full((COUNT, count), 1 - 1e-12))
    images = ramps()
    torch.testing.assert_close(CROP(images, draws([COUNT])), images, rtol=0, atol=1e-9)


@pytest.mark.parametrize("augmentation", [FLIP, CROP])
def test_an_image_changes_in_the_same_way_whoever_shares_the_batch(augmentation: Augmentation) -> None:
    images = torch.rand(9, 3, 8, 8, dtype=torch.float64)
    together = augmentation(images, draws([4, 3, 2], clients=[5, 8, 5]))
    alone = augmentation(images[4:7], draws([3], clients=[8]))
    torch.testing.assert_close(together[4:7], alone, rtol=0, atol=1e-14)
    # A copy of the first client's samples, as at another exit.
    again = augmentation(images[:2].repeat(2, 1, 1, 1), draws([2, 2], clients=[5, 5]))
    assert torch.equal(again[:2], again[2:])


def test_draws_differ_by_round_step_client_and_place() -> None:
    settings = [draws([2], [c], step, round) for c in range(3) for step in range(3) for round in range(3)]
    numbers = np.concatenate([setting.uniform(2) for setting in settings]).ravel()
    assert len(np.unique(numbers)) == len(numbers)


@pytest.mark.parametrize("name", ["none", "flip", "crop_flip"])
def test_only_batches_drawn_for_training_change(make_tree, name: str) -> None:
    root = make_tree({"a": ["x", "y"]}, count=20)
    config = DataConfig("image_folder", str(root), image_size=8, augmentation=name)
    prepared = prepare(load_source(config, seed=0), config, str(root), MODEL)
    rows = torch.arange(8)

    def pixels(samples: ImageSamples, step: int | None) -> torch.Tensor:
        drawn = None if step is None else draws([8], step=step)
        return samples.batch(rows, torch.device("cpu"), torch.float32, drawn).inputs["pixel_values"]

    train, test = prepared.train, prepared.test
    assert torch.equal(pixels(test, 0), pixels(test, None))
    assert torch.equal(pixels(train, None), train.inputs(rows, torch.device("cpu"), torch.float32)["pixel_values"])
    assert torch.equal(pixels(train, 0), pixels(train, 0))
    for before, after in ((None, 0), (0, 1)):
        assert torch.equal(pixels(train, before), pixels(train, after)) == (name == "none")


def test_augmentation_comes_before_normalisation() -> None:
    pixels = torch.randint(0, 256, (6, 1, 8, 8), dtype=torch.uint8)
    labels, statistics = torch.zeros(6, dtype=torch.int64), Preprocessing(8, 1, (0.4,), (0.3,))
    store = ImageSamples(StoredRows([pixels]), labels, labels, statistics, augmentation=CROP)
    found = store.batch(torch.arange(6), torch.device("cpu"), torch.float64, draws([6])).inputs["pixel_values"]
    expected = (CROP(pixels.double(), draws([6])) / 255 - 0.4) / 0.3
    torch.testing.assert_close(found, expected)


def test_every_configured_name_gives_its_augmentation() -> None:
    assert make_augmentation(DataConfig()) is None
    assert make_augmentation(DataConfig(augmentation="flip")) == Augmentation(None)
    assert make_augmentation(DataConfig(augmentation="crop_flip", crop_scale=0.5)) == Augmentation(0.5)


def test_options_for_images_are_refused_with_texts_and_the_other_way_round(tmp_path: Path) -> None:
    from datasets import Dataset

    zeros = np.zeros(4, dtype=np.int64)
    texts = DomainData(
        "text_classification", Dataset.from_dict({"text": list("abcd")}), zeros, ["d"], zeros, ["x"], zeros > 0
    )
    with pytest.raises(InputError, match=r"data\.augmentation: found flip with texts, expected none"):
        prepare(texts, DataConfig(augmentation="flip"), save_encoder_tokenizer(tmp_path / "model"), MODEL)
    with pytest.raises(InputError, match=r"data\.image_size: found 8 with texts, expected null"):
        prepare(texts, DataConfig(image_size=8), save_encoder_tokenizer(tmp_path / "model"), MODEL)
    with pytest.raises(InputError, match=r"data\.max_length: found 8 with images, expected null"):
        prepare(replace(texts, task="image_classification"), DataConfig(max_length=8), "", MODEL)
