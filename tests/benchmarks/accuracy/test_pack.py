"""A pack gives back every pixel and every bf16 weight, or says what is wrong with it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.accuracy.inputs import model_config, model_folder, read_images
from benchmarks.accuracy.pack import pack
from benchmarks.accuracy.planes import from_planes, to_planes
from benchmarks.accuracy.sheets import from_sheet, to_sheet
from fedra_engine.config import ModelConfig
from fedra_engine.data.preprocessing import preprocessing_for
from fedra_engine.data.samples import ImageSamples, StoredRows
from fedra_engine.models.loading import load_pretrained
from fedra_engine.runtime.errors import InputError
from tests.benchmarks.accuracy.tiny_study import SETTING

pytestmark = pytest.mark.slow

PACS, VIT = os.environ.get("FEDRA_PACS"), os.environ.get("FEDRA_VIT")
SIZE = SETTING.image_size


@pytest.fixture(scope="module")
def packed(images: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("packs") / "pack"
    pack(images, model, output, image_size=SIZE)
    return output


def features(images: Path, model: Path, image_size: int) -> torch.Tensor:
    """What the bf16 model makes of some of the images."""
    with model_folder(model) as folder:
        data = read_images(images, folder, image_size).data
        loaded = load_pretrained(ModelConfig(str(folder), dtype="bfloat16"), classes=len(data.classes)).eval()
        preprocessing = preprocessing_for(str(folder), model_config(folder), image_size)
    rows = torch.arange(0, len(data), max(len(data) // 40, 1))
    pixels = torch.from_numpy(data.content)
    labels, domains = torch.from_numpy(data.labels), torch.from_numpy(data.domain_of)
    store = ImageSamples(StoredRows([pixels]), labels, domains, preprocessing)
    with torch.no_grad():
        return loaded(**store.inputs(rows, torch.device("cpu"), torch.bfloat16)).logits


def test_all_bit_patterns_of_bf16_survive() -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    shapes = [(2**14,), (3, 2**14), (0, 5)]
    tensors = [part.view(*shape) for part, shape in zip(every.split([2**14, 3 * 2**14, 0]), shapes, strict=True)]
    found = from_planes(*to_planes(tensors), shapes)
    for before, after in zip(tensors, found, strict=True):
        assert before.shape == after.shape
        assert torch.equal(before.view(torch.int16), after.view(torch.int16))


@given(st.integers(1, 20), st.sampled_from([1, 3]), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_all_pixels_survive(count: int, channels: int, side: int, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(256, size=(count, channels, side, side), dtype=np.uint8)
    assert np.array_equal(from_sheet(to_sheet(pixels), count, channels, side), pixels)


def test_a_pack_holds_the_images_of_its_folder(images: Path, model: Path, packed: Path) -> None:
    before, after = read_images(images, model, SIZE), read_images(packed, model, SIZE)
    assert before.digest() == after.digest()
    assert (after.data.domains, after.data.classes) == (["art", "cartoon", "photo", "sketch"], ["cat", "dog"])
    assert (len(after.data), after.image_size, after.is_split) == (40, SIZE, False)


def test_a_test_set_of_folders_stays_the_test_set(images: Path, model: Path, tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / "split" / split).mkdir(parents=True)
        (tmp_path / "split" / split / "photo").symlink_to(images / "photo")
    pack(tmp_path / "split", model, tmp_path / "pack", image_size=SIZE)
    found = read_images(tmp_path / "pack", model, SIZE)
    assert found.is_split
    assert found.data.is_test.tolist() == [False] * 10 + [True] * 10


def test_packed_images_and_model_give_the_same_features(images: Path, model: Path, packed: Path) -> None:
    assert torch.equal(features(images, model, SIZE), features(packed, packed, SIZE))


@pytest.mark.skipif(None in (PACS, VIT), reason="FEDRA_PACS and FEDRA_VIT name no folders with PACS and a ViT-S/14")
def test_pacs_and_a_vit_give_the_same_features_and_fit(tmp_path: Path) -> None:
    images, model, output = Path(str(PACS)), Path(str(VIT)), tmp_path / "pack"
    sizes = pack(images, model, output)
    assert len(sizes) == 8
    assert sum(sizes.values()) < 40 * 2**20
    assert torch.equal(features(images, model, 56), features(output, output, 56))


def test_a_pack_above_the_limit_is_refused_and_not_written(images: Path, model: Path, tmp_path: Path) -> None:
    expected = r"--limit: found a pack of 0\.\d MiB, 0\.\d of them images, expected at most 0\.001 .*higher --limit"
    with pytest.raises(InputError, match=expected):
        pack(images, model, tmp_path / "pack", image_size=SIZE, limit_mib=0.001)
    assert not (tmp_path / "pack").exists()


def test_the_size_of_every_file_is_printed(
    images: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = pack(images, model, tmp_path / "pack", image_size=SIZE)
    lines = capsys.readouterr().out.splitlines()
    assert (
        {line.split()[-1] for line in lines[:-1]} == set(sizes) == {path.name for path in (tmp_path / "pack").iterdir()}
    )
    assert f"in {len(sizes)} files" in lines[-1]


def test_a_folder_in_use_is_left_alone(images: Path, model: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(InputError, match=r"pack: found files in .*, expected a new or empty folder"):
        pack(images, model, tmp_path, image_size=SIZE)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_pack_is_not_packed_again(packed: Path, model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="images: found a pack in"):
        pack(packed, model, tmp_path / "pack", image_size=SIZE)


@pytest.mark.parametrize("name", ["images_2.webp", "mantissas.bin", "exponents.deflate"])
def test_damage_is_reported_with_the_file(images: Path, model: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "pack"
    pack(images, model, folder, image_size=SIZE)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(InputError, match=f"{name}: found other bytes than were packed"), model_folder(folder) as loaded:
        read_images(folder, loaded, SIZE)


@pytest.mark.parametrize("damage", ["no folder", "no image"])
def test_what_is_wrong_with_a_folder_is_said_of_images(model: Path, tmp_path: Path, damage: str) -> None:
    if damage == "no image":
        (tmp_path / "images" / "photo" / "cat").mkdir(parents=True)
        (tmp_path / "images" / "photo" / "cat" / "0.png").write_text("no image")
    with pytest.raises(InputError, match=r"^images: (found no folder|cannot read) "):
        read_images(tmp_path / "images", model, SIZE)


def test_a_pack_of_another_size_is_refused(packed: Path, model: Path) -> None:
    with pytest.raises(InputError, match="images: found a pack at 8 pixels, expected one at 56"):
        read_images(packed, model, 56)
