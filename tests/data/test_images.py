"""Any image becomes bytes in the model's size, once; what is none is named."""

import errno
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fedra_engine.config import DataConfig
from fedra_engine.data import cache as cache_module
from fedra_engine.data import images as module
from fedra_engine.data.cache import cache_folder
from fedra_engine.data.domain_data import DomainData
from fedra_engine.data.images import image_rows
from fedra_engine.data.preprocessing import Preprocessing
from fedra_engine.data.samples import ImageSamples, prepare
from fedra_engine.data.sources import load_source
from fedra_engine.runtime.errors import InputError
from fedra_engine.runtime.stages import Stage
from tests.data.preprocessed import preprocess

RGB = Preprocessing(8, 3, (0.5, 0.4, 0.3), (0.2, 0.25, 0.5))
GREY = Preprocessing(8, 1, (0.5,), (0.5,))
CPU = torch.device("cpu")


def load(root: Path) -> DomainData:
    return load_source(DataConfig("image_folder", str(root)), seed=0).train


def all_pixels(store: ImageSamples) -> torch.Tensor:
    return store.pixels.gather(torch.arange(len(store)), CPU)


def save_one(tmp_path: Path, picture: Image.Image, name: str) -> torch.Tensor:
    """What `picture`, saved as `name`, becomes in grey: [height, width]."""
    folder = tmp_path / "images" / "a" / "x"
    folder.mkdir(parents=True)
    for index in range(2):
        picture.save(folder / f"{index} {name}")
    return all_pixels(preprocess(load(tmp_path / "images"), GREY))[0, 0]


def test_pixels_are_the_image_resized(make_tree) -> None:
    data = load(make_tree({"a": ["x"]}))
    pixels = all_pixels(preprocess(data, RGB))
    assert pixels.shape == (4, 3, 8, 8)
    assert pixels.dtype == torch.uint8
    for image, found in zip(data.content["image"], pixels, strict=True):
        expected = np.asarray(image.convert("RGB").resize((8, 8), Image.Resampling.BICUBIC))
        np.testing.assert_array_equal(found.permute(1, 2, 0), expected)


@pytest.mark.parametrize(
    ("suffix", "mode"), [("jpg", "L"), ("jpg", "CMYK"), ("gif", "P"), ("png", "P"), ("png", "RGBA"), ("png", "1")]
)
def test_any_kind_of_image_becomes_the_models_channels(make_tree, suffix: str, mode: str) -> None:
    data = load(make_tree({"a": ["x"]}, suffix=suffix, mode=mode))
    expected = [image.convert("RGB").resize((8, 8), Image.Resampling.BICUBIC) for image in data.content["image"]]
    np.testing.assert_array_equal(all_pixels(preprocess(data, RGB)).permute(0, 2, 3, 1), np.stack(expected))
    assert all_pixels(preprocess(data, GREY)).shape == (4, 1, 8, 8)


@pytest.mark.parametrize("name", ["16 bit.png", "16 bit.tif"])
def test_sixteen_bits_are_scaled_to_eight(tmp_path: Path, name: str) -> None:
    levels = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    found = save_one(tmp_path, Image.fromarray(levels), name)
    np.testing.assert_array_equal(found, levels // 257)


def test_thirty_two_bits_that_hold_bytes_stay_as_they_are(tmp_path: Path) -> None:
    levels = np.arange(64, dtype=np.int32).reshape(8, 8) * 4
    np.testing.assert_array_equal(save_one(tmp_path, Image.fromarray(levels), "32 bit.tif"), levels)


@pytest.mark.parametrize("greatest", [1.0, 252.0])
def test_fractions_are_of_one_or_of_255(tmp_path: Path, greatest: float) -> None:
    levels = np.arange(64, dtype=np.float32).reshape(8, 8) * 4
    found = save_one(tmp_path, Image.fromarray(levels * np.float32(greatest / 252)), "fractions.tif")
    np.testing.assert_array_equal(found, np.rint(levels * (255 / 252 if greatest == 1 else 1)))


@pytest.mark.parametrize("wrong", [-1.0, 256.0, np.nan])
def test_fractions_of_something_else_are_named(tmp_path: Path, wrong: float) -> None:
    levels = np.full((8, 8), 0.5, dtype=np.float32)
    levels[3, 3] = wrong
    with pytest.raises(InputError, match=r"\d fractions\.tif: its grey levels are fractions outside 0 to 255"):
        save_one(tmp_path, Image.fromarray(levels), "fractions.tif")


def test_labels_and_domains_follow_the_samples(make_tree) -> None:
    data = load(make_tree({"a": ["x", "y"], "b": ["y"]}))
    store = preprocess(data, RGB)
    assert store.labels.tolist() == data.labels.tolist()
    assert store.domains.tolist() == data.domain_of.tolist()
    assert store.labels.dtype == store.domains.dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_inputs_are_normalised(make_tree, dtype: torch.dtype) -> None:
    store = preprocess(load(make_tree({"a": ["x"]})), RGB)
    rows = torch.tensor([2, 0])
    inputs, labels, _ = store.batch(rows, CPU, dtype)
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (RGB.mean, RGB.std))
    expected = (all_pixels(store)[rows].double() / 255 - mean) / std
    assert inputs["pixel_values"].dtype == dtype
    torch.testing.assert_close(inputs["pixel_values"], expected.to(dtype))
    assert torch.equal(labels, store.labels[rows])


def test_damaged_images_are_named(make_tree) -> None:
    root = make_tree({"a": ["x"]}, suffix="jpg")
    for image in root.rglob("*.jpg"):
        image.write_bytes(image.read_bytes()[:-40])
    with pytest.raises(InputError, match=r"data\.root: cannot read .*/a/x/\d\.jpg: image file is truncated"):
        preprocess(load(root), RGB)
    for image in root.rglob("*.jpg"):
        image.write_text("hello")
    with pytest.raises(InputError, match=r"data\.root: cannot read .*/a/x/\d\.jpg: cannot identify"):
        preprocess(load(root), RGB)
    assert [path.name for path in cache_folder().iterdir()] == ["lock"]


@pytest.mark.parametrize(
    "error",
    [EOFError("no more"), struct.error("short"), TypeError("none"), IndexError(), KeyError(3), ValueError("bad")],
)
def test_whatever_pillow_raises_names_the_image(make_tree, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    data = load(make_tree({"a": ["x"]}))
    monkeypatch.setattr(module.PillowImage, "open", fail)
    with pytest.raises(InputError, match=r"data\.root: cannot read .*/a/x/\d\.png: \S.*; expected a readable file"):
        preprocess(data, RGB)


def test_damaged_images_are_skipped_on_demand(make_tree) -> None:
    root = make_tree({"a": ["x", "y"]}, count=10)
    broken = root / "a" / "y" / "3.png"
    broken.write_text("hello")
    config = DataConfig("image_folder", str(root), image_size=8, unreadable="skip")
    data = load_source(config, seed=0)
    for _ in range(2):
        prepared = prepare(data, config, str(root), type("Config", (), {"num_channels": 3, "model_type": "vit"}))
        assert len(prepared.data) == len(data) - 1
        assert len(prepared.train.labels) + len(prepared.test.labels) == 19
        assert [note.partition(":")[0] for note in prepared.data.notes] == [str(broken)]
        # Rows behind the broken one still have their own pixels.
        rows = torch.arange(len(prepared.test.labels))
        found = prepared.test.pixels.gather(prepared.test.stored[rows], CPU)
        expected = [
            np.asarray(image.resize((8, 8), Image.Resampling.BICUBIC)) for image in prepared.data.test.content["image"]
        ]
        np.testing.assert_array_equal(found.permute(0, 2, 3, 1), np.stack(expected))
        assert prepared.train.labels.tolist() == prepared.data.train.labels.tolist()
    with pytest.raises(InputError, match=r"data\.root: cannot read .*/a/y/3\.png"):
        image_rows(data, RGB, skip=False)


def test_a_domain_of_which_nothing_is_left_is_named(make_tree) -> None:
    root = make_tree({"a": ["x"], "b": ["x"]})
    for image in (root / "b").rglob("*.png"):
        image.write_text("hello")
    config = DataConfig("image_folder", str(root), image_size=8, unreadable="skip")
    with pytest.raises(InputError, match=r"data\.root: found no training samples of domain 'b'"):
        prepare(load_source(config, seed=0), config, str(root), type("Config", (), {"num_channels": 3}))


def test_a_file_that_may_not_be_opened_is_never_skipped(make_tree, monkeypatch: pytest.MonkeyPatch) -> None:
    data = load(make_tree({"a": ["x"]}))

    def deny(*_: object, **__: object) -> None:
        # The tests may run as a user whom no permission binds.
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(module.PillowImage, "open", deny)
    with pytest.raises(InputError, match=r"data\.root: cannot read .*\.png: Permission denied"):
        image_rows(data, RGB, skip=True)


def test_what_pillow_finds_odd_is_kept_from_the_output(make_tree, recwarn: pytest.WarningsRecorder) -> None:
    root = make_tree({"a": ["x"]})
    image = root / "a" / "x" / "9.tif"
    Image.new("RGB", (8, 8)).save(image)
    image.write_bytes(image.read_bytes()[:40])
    with pytest.raises(InputError, match=r"cannot read .*/a/x/9\.tif"):
        preprocess(load(root), RGB)
    assert not recwarn.list


def test_a_pipe_is_no_image(make_tree) -> None:
    root = make_tree({"a": ["x"]})
    os.mkfifo(root / "a" / "x" / "9.png")
    with pytest.raises(InputError, match=r"data\.root: cannot read .*/a/x/9\.png: it is no regular file; expected"):
        preprocess(load(root), RGB)


def test_an_image_that_another_program_would_decode_is_none(make_tree) -> None:
    root = make_tree({"a": ["x"]})
    Image.new("RGB", (8, 8)).save(root / "a" / "x" / "9.png", format="EPS")
    with pytest.raises(InputError, match=r"cannot read .*/a/x/9\.png: cannot identify image file"):
        preprocess(load(root), RGB)


def test_links_to_nowhere_are_named(make_tree) -> None:
    root = make_tree({"a": ["x"]})
    for image in root.rglob("*.png"):
        image.unlink()
        image.symlink_to(root / "nowhere.png")
    with pytest.raises(InputError, match=r"data\.root: cannot read .*/a/x/\d\.png: No such file"):
        preprocess(load(root), RGB)


def test_files_are_decoded_once_until_they_change(make_tree, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_tree({"a": ["x"]})
    before = all_pixels(preprocess(load(root), RGB))
    with monkeypatch.context() as patch:
        patch.setattr(module.PillowImage, "open", lambda *_, **__: pytest.fail("decoded again"))
        assert torch.equal(all_pixels(preprocess(load(root), RGB)), before)
        # The statistics are applied later.
        preprocess(load(root), Preprocessing(8, 3, (0, 0, 0), (1, 1, 1)))
    for image in root.rglob("*.png"):
        Image.new("RGB", (10, 12)).save(image)
        os.utime(image, ns=(1, 1))
    assert all_pixels(preprocess(load(root), RGB)).max() == 0
    for other in (Preprocessing(9, 3, (0, 0, 0), (1, 1, 1)), Preprocessing(8, 1, (0,), (1,))):
        shape = all_pixels(preprocess(load(root), other)).shape
        assert other.image_size in shape[1:]
        assert other.channels in shape[1:]


def test_an_image_of_equal_length_is_another_one_when_its_time_is(make_tree) -> None:
    root = make_tree({"a": ["x"]})
    for level in (0, 255):
        for image in root.rglob("*.png"):
            Image.new("L", (10, 12), level).save(image, format="BMP")
            os.utime(image, ns=(level, level))
        assert (all_pixels(preprocess(load(root), RGB)) == level).all()


def test_another_split_or_a_domain_alone_decodes_nothing_again(make_tree, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_tree({"a": ["x"], "b": ["x", "y"]})
    config = DataConfig("image_folder", str(root))
    image_rows(load_source(config, seed=0), RGB, skip=False)
    monkeypatch.setattr(module.PillowImage, "open", lambda *_, **__: pytest.fail("decoded again"))
    image_rows(load_source(config, seed=1), RGB, skip=False)
    image_rows(load_source(DataConfig("image_folder", str(root), domains=["b"]), seed=0), RGB, skip=False)


def test_progress_counts_every_sample(make_tree, monkeypatch: pytest.MonkeyPatch) -> None:
    stages: list[list[int]] = []

    class Counted(Stage):
        def __init__(self, what: str, total: int | None = None) -> None:
            super().__init__(what, total)
            if total is not None:
                stages.append([total, 0])

        def advance(self, count: int) -> None:
            stages[-1][1] += count

    monkeypatch.setattr(cache_module, "Stage", Counted)
    data = load(make_tree({"a": ["x"], "b": ["x", "y"]}))
    for _ in range(2):
        image_rows(data, RGB, skip=False)
    assert stages == [[12, 12]] * 2


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_images_are_turned_upright(tmp_path: Path, orientation: int) -> None:
    folder = tmp_path / "images" / "a" / "x"
    folder.mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.random.default_rng(0).integers(256, size=(8, 12, 3), dtype=np.uint8)
    for index in range(2):
        Image.fromarray(pixels).save(folder / f"{index}.png", exif=exif)
    data = load(tmp_path / "images")
    # As the datasets library decodes them.
    expected = data.content["image"][0].convert("RGB").resize((8, 8), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(all_pixels(preprocess(data, RGB))[0].permute(1, 2, 0), np.asarray(expected))


def test_unreadable_notes_of_a_camera_do_not_matter(make_tree, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise SyntaxError("not a TIFF file")

    data = load(make_tree({"a": ["x"]}))
    monkeypatch.setattr(Image.Image, "getexif", fail)
    assert all_pixels(preprocess(data, RGB)).any()
