"""What a model wants of its images is found beside it."""

import json
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from fedra_engine.data import preprocessing as module
from fedra_engine.data.preprocessing import Preprocessing, preprocessing_for, standardize
from fedra_engine.runtime.errors import InputError


def model(channels: int = 3, image_size: object = 224) -> SimpleNamespace:
    return SimpleNamespace(num_channels=channels, image_size=image_size)


def write_settings(folder: Path, **settings: object) -> str:
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return str(folder)


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


def test_settings_of_a_processor_of_images_and_texts_are_found(tmp_path: Path) -> None:
    processor = {"image_processor": {"size": {"height": 96, "width": 96}, "image_mean": [0.1, 0.2, 0.3]}}
    (tmp_path / "processor_config.json").write_text(json.dumps(processor))
    assert preprocessing_for(str(tmp_path), model()) == Preprocessing(96, 3, (0.1, 0.2, 0.3), (0.229, 0.224, 0.225))
    # Its own file comes first; a processor of texts alone says nothing.
    write_settings(tmp_path, size=64)
    assert preprocessing_for(str(tmp_path), model()).image_size == 64
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text("{}")
    assert preprocessing_for(str(tmp_path), model()).image_size == 224


def test_null_stands_for_what_is_usual(tmp_path: Path) -> None:
    usual = preprocessing_for(str(tmp_path), model())
    path = write_settings(tmp_path, image_mean=None, image_std=None, do_rescale=None, size=None)
    assert preprocessing_for(path, model()) == usual


def test_timm_models_carry_their_settings_with_them(tmp_path: Path) -> None:
    known = {"input_size": [3, 224, 224], "mean": [0.5, 0.5, 0.4], "std": [0.5, 0.5, 0.3]}
    timm = SimpleNamespace(model_type="timm_wrapper", pretrained_cfg=known)
    assert preprocessing_for(str(tmp_path), timm) == Preprocessing(224, 3, (0.5, 0.5, 0.4), (0.5, 0.5, 0.3))


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
        ({"image_std": [0.5, None, 0.5]}, model(), r"expected one value for each of the model's 3 channels"),
        ({"image_std": [0.5, 0, 0.5]}, model(), r"and image_std above 0"),
        ({"size": 0}, model(), r"data\.image_size: found null and a model of image size 0, expected one side"),
        ({"size": True}, model(), r"data\.image_size: found null and a model of image size True, expected one side"),
        ({"rescale_factor": 0.5}, model(), r"rescale_factor 0\.5, expected scaling by 1/255"),
        ({"rescale_factor": "1/255"}, model(), r"rescale_factor 1/255, expected scaling by 1/255"),
        ({"image_std": 0.5}, model(), r"expected one value for each of the model's 3 channels"),
        ({}, model(4), r"model of 4 image channels, expected 1 or 3"),
    ],
)
def test_what_cannot_be_done_is_said(
    tmp_path: Path, settings: dict[str, object], config: SimpleNamespace, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        preprocessing_for(write_settings(tmp_path, **settings), config)


def test_settings_that_are_neither_cached_nor_reachable_are_reported(
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


def test_settings_that_are_no_object_are_reported(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text("[]")
    with pytest.raises(InputError, match=r"preprocessor_config\.json: found no JSON object"):
        preprocessing_for(str(tmp_path), model())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_images_are_standardized_in_float32_at_least(dtype: torch.dtype) -> None:
    preprocessing = Preprocessing(4, 3, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
    pixels = torch.arange(96, dtype=torch.uint8).view(2, 3, 4, 4)
    mean, std = (torch.tensor(values).double()[:, None, None] for values in (preprocessing.mean, preprocessing.std))
    expected = (pixels / 255 - mean) / std
    torch.testing.assert_close(standardize(pixels, preprocessing, dtype), expected.to(dtype), check_dtype=True)
    on_meta = standardize(pixels.to("meta"), preprocessing, dtype)
    assert (on_meta.shape, on_meta.dtype) == (pixels.shape, dtype)
