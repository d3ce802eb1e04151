"""Images reach the model in the size and with the statistics that it was trained with."""

import json
import os
import struct
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from PIL import Image

from fedra_engine.config import DataConfig
from fedra_engine.data import preprocessing as module
from fedra_engine.data.preprocessing import preprocess, preprocessing_for
from fedra_engine.data.samples import Preprocessing
from fedra_engine.data.sources import load_source
from fedra_engine.errors import InputError

RGB = Preprocessing(8, 3, (0.5, 0.4, 0.3), (0.2, 0.25, 0.5))


def model(channels: int = 3, image_size: object = 224) -> SimpleNamespace:
    return SimpleNamespace(num_channels=channels, image_size=image_size)


def write_settings(folder: Path, **settings: object) -> str:
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return str(folder)


def load(root: Path):
    return load_source(DataConfig("image_folder", str(root)), seed=0).train


def test_without_settings_the_model_tells_the_size(tmp_path: Path) -> None:
    assert preprocessing_for(str(tmp_path), model()) == Preprocessing(
        224, 3, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    )
    assert preprocessing_for(str(tmp_path), model(1, [8, 8])) == Preprocessing(8, 1, (0.5,), (0.5,))


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ({"size": {"height": 96, "width": 96}}, 96),
        (
            {
                "size": {"shortest_edge": 256},
                "do_center_crop": True,
                "crop_size": {"height": 224, "width": 224},
            },
            224,
        ),
        ({"size": 64}, 64),
    ],
)
def test_settings_beside_the_model_come_first(tmp_path: Path, settings: dict[str, object], size: int) -> None:
    path = write_settings(tmp_path, image_mean=[0.1, 0.2, 0.3], image_std=[1, 2, 3], **settings)
    assert preprocessing_for(path, model()) == Preprocessing(size, 3, (0.1, 0.2, 0.3), (1, 2, 3))
    assert preprocessing_for(path, model(), image_size=32).image_size == 32


@pytest.mark.parametrize(
    ("settings", "config", "message"),
    [
        (
            {"size": {"height": 8, "width": 9}},
            model(),
            r"data\.image_size: found null and a model of image size",
        ),
        ({}, model(image_size=None), r"data\.image_size: found null"),
        ({"image_mean": [0.5]}, model(), r"expected one value for each of the model's 3 channels"),
        ({"rescale_factor": 0.5}, model(), r"rescale_factor 0\.5, expected scaling by 1/255"),
        ({}, model(4), r"model of 4 image channels, expected 1 or 3"),
    ],
)
def test_what_cannot_be_done_is_said(
    tmp_path: Path, settings: dict[str, object], config: SimpleNamespace, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        preprocessing_for(write_settings(tmp_path, **settings), config)


def test_pixels_are_the_image_resized(make_tree) -> None:
    root = make_tree({"a": ["x"]})
    data = load(root)
    store = preprocess(data, RGB)
    assert store.pixels.shape == (4, 3, 8, 8)
    assert store.pixels.dtype == torch.uint8
    for image, pixels in zip(data["image"], store.pixels, strict=True):
        expected = np.asarray(image.convert("RGB").resize((8, 8), Image.Resampling.BICUBIC))
        np.testing.assert_array_equal(pixels.permute(1, 2, 0), expected)


@pytest.mark.parametrize(("suffix", "mode"), [("jpg", "L"), ("gif", "P"), ("png", "RGBA"), ("png", "1")])
def test_any_kind_of_image_becomes_the_models_channels(make_tree, suffix: str, mode: str) -> None:
    data = load(make_tree({"a": ["x"]}, suffix=suffix, mode=mode))
    assert preprocess(data, RGB).pixels.shape[1] == 3
    assert preprocess(data, Preprocessing(8, 1, (0.5,), (0.5,))).pixels.shape[1] == 1


def test_labels_and_domains_follow_the_samples(make_tree) -> None:
    data = load(make_tree({"a": ["x", "y"], "b": ["y"]}))
    store = preprocess(data, RGB)
    assert store.labels.tolist() == data["label"][:]
    assert store.domains.tolist() == data["domain"][:]
    assert store.labels.dtype == store.domains.dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_inputs_are_normalised(make_tree, dtype: torch.dtype) -> None:
    store = preprocess(load(make_tree({"a": ["x"]})), RGB)
    rows = torch.tensor([2, 0])
    pixels = store.inputs(rows, "cpu", dtype)["pixel_values"]
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (RGB.mean, RGB.std))
    expected = (store.pixels[rows].double() / 255 - mean) / std
    assert pixels.dtype == dtype
    torch.testing.assert_close(pixels, expected.to(dtype))


def test_unreadable_images_are_named(make_tree) -> None:
    root = make_tree({"a": ["x"]})
    for image in root.rglob("*.png"):
        image.write_bytes(image.read_bytes()[:60])
    with pytest.raises(InputError, match=r"data\.root: cannot read .*/a/x/\d\.png: "):
        preprocess(load(root), RGB)
    for image in root.rglob("*.png"):
        image.write_text("hello")
    with pytest.raises(InputError, match=r"data\.root: cannot read .*/a/x/\d\.png: "):
        preprocess(load(root), RGB)


@pytest.mark.parametrize(
    "error",
    [EOFError("no more"), struct.error("short"), TypeError("none"), IndexError(), KeyError(3), ValueError("bad")],
)
def test_whatever_pillow_raises_names_the_image(make_tree, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object) -> None:
        raise error

    data = load(make_tree({"a": ["x"]}))
    monkeypatch.setattr(module.PillowImage, "open", fail)
    with pytest.raises(InputError, match=r"data\.root: cannot read .*/a/x/\d\.png: \S.*; expected an image file"):
        preprocess(data, RGB)


def test_links_to_nowhere_are_named(make_tree) -> None:
    root = make_tree({"a": ["x"]})
    for image in root.rglob("*.png"):
        image.unlink()
        image.symlink_to(root / "nowhere.png")
    with pytest.raises(InputError, match=r"data\.root: cannot read .*/a/x/\d\.png: .*No such file"):
        preprocess(load(root), RGB)


def test_settings_that_are_neither_cached_nor_reachable_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        InputError, match=r"^model\.path: found no preprocessor_config\.json of 'some/model' in the cache.*$"
    ):
        preprocessing_for("some/model", model())


@pytest.mark.parametrize(
    ("error", "cached"),
    [
        # An answer of the hub, and the memory of one.
        (EntryNotFoundError("404"), None),
        (LocalEntryNotFoundError("offline"), huggingface_hub._CACHED_NO_EXIST),
    ],
)
def test_hub_models_may_have_no_settings(monkeypatch: pytest.MonkeyPatch, error: Exception, cached: object) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(module, "hf_hub_download", fail)
    monkeypatch.setattr(module, "try_to_load_from_cache", lambda *_: cached)
    assert preprocessing_for("some/model", model()).image_size == 224


def test_files_are_decoded_once_until_they_change(make_tree, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_tree({"a": ["x"]})
    before = preprocess(load(root), RGB)

    with monkeypatch.context() as patch:
        patch.setattr(module.PillowImage, "open", lambda *_: pytest.fail("decoded again"))
        again = preprocess(load(root), RGB)
    assert torch.equal(before.pixels, again.pixels)

    for image in root.rglob("*.png"):
        Image.new("RGB", (10, 12)).save(image)
        os.utime(image, ns=(1, 1))
    assert preprocess(load(root), RGB).pixels.max() == 0
