"""Image folders: what is found, how it is split, and what is said about folders that cannot be used."""

import errno
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fedra_engine.config import DataConfig
from fedra_engine.data.preprocessing import preprocessing_for
from fedra_engine.data.sources import DomainData, load_source
from fedra_engine.data.sources.image_files import SPLITS
from fedra_engine.runtime.errors import InputError
from tests.data.preprocessed import preprocess

PACS = os.environ.get("FEDRA_PACS")
"""Folder of the real data set, if there is one."""


DOMAINS = {"a": ["x", "y"], "b": ["x"]}


def load(root: Path, seed: int = 0, domains: list[str] | None = None, test_fraction: float = 0.2) -> DomainData:
    config = DataConfig("image_folder", str(root), domains=domains or [], test_fraction=test_fraction)
    return load_source(config, seed)


def paths(data: DomainData) -> tuple[list[str], list[str]]:
    train, test = ([image["path"] for image in encoded(part)] for part in (data.train, data.test))
    return train, test


def encoded(data: DomainData) -> list[dict[str, str]]:
    from datasets import Image

    return list(data.content.cast_column("image", Image(decode=False))["image"])


def test_domains_and_classes_are_sorted_and_indexed(make_tree) -> None:
    data = load(make_tree({"sketch": ["dog", "cat"], "photo": ["cat", "emu"]}))
    assert data.domains == ["photo", "sketch"]
    assert data.classes == ["cat", "dog", "emu"]
    for image, label, domain in zip(encoded(data), data.labels, data.domain_of, strict=True):
        folder = Path(image["path"]).parent
        assert (folder.parent.name, folder.name) == (data.domains[domain], data.classes[label])


def test_every_class_of_every_domain_gives_its_share_to_the_test_set(make_tree) -> None:
    data = load(make_tree({"a": ["x", "y"], "b": ["x"]}, count=10), test_fraction=0.3)
    train, test = paths(data)
    assert (len(train), len(test)) == (21, 9)
    assert not set(train) & set(test)
    counts = np.bincount(2 * data.test.domain_of + data.test.labels)
    assert counts.tolist() == [3, 3, 3]


@pytest.mark.parametrize("fraction", [0.01, 0.99])
def test_a_class_is_never_all_training_or_all_test_unless_it_has_one_image(make_tree, fraction: float) -> None:
    root = make_tree({"a": ["x", "y", "z"]}, count=2)
    (root / "a" / "z" / "0.png").unlink()
    data = load(root, test_fraction=fraction)
    assert sorted(data.train.labels) == [0, 1, 2]
    assert sorted(data.test.labels) == [0, 1]


def test_a_domain_without_a_test_image_is_named(make_tree) -> None:
    root = make_tree({"a": ["x"], "b": ["x", "y"]}, count=2)
    (root / "b" / "x" / "0.png").unlink()
    assert set(load(root).test.domain_of) == {0, 1}
    (root / "b" / "y" / "0.png").unlink()
    with pytest.raises(InputError, match=r"data\.test_fraction: found 0\.2 but no test sample in domain 'b'"):
        load(root)


def test_the_seed_decides_the_split(make_tree) -> None:
    root = make_tree({"a": ["x"]}, count=30)
    assert paths(load(root, seed=1)) == paths(load(root, seed=1))
    assert paths(load(root, seed=1)) != paths(load(root, seed=2))


def test_chosen_domains_keep_the_given_order(make_tree) -> None:
    data = load(make_tree({"a": ["x"], "b": ["x"], "c": ["x"]}), domains=["c", "a"])
    assert data.domains == ["c", "a"]
    assert {Path(path).parts[-3] for path in paths(data)[0]} == {"a", "c"}


def test_what_systems_leave_in_folders_needs_no_word(make_tree) -> None:
    root = make_tree({"a": ["x"]})
    (root / ".git" / "objects").mkdir(parents=True)
    (root / "a" / "x" / "Thumbs.db").write_text("of Windows")
    (root / "a" / "x" / "._0.png").write_text("of macOS")
    (root / "._a").write_text("of macOS")
    data = load(root)
    assert len(data.train) == 4
    assert data.notes == []


def write(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")


def test_what_is_left_out_is_counted_and_named(make_tree) -> None:
    root = make_tree({"a": ["x"]})
    for name in ("README.md", "a/1.png", "a/x/b.txt", "a/x/a.TXT", "a/x/sub/2.png", "a/x/sub/deep/3.png", "a/x/noun"):
        write(root / name)
    (root / "a" / "x" / "loop").symlink_to(root)
    assert load(root).notes == [
        # The link to a folder is one of them, as it may lead back.
        f"warning: {root}: left out 3 .png, 2 .txt, 2 without suffix, 1 .md: README.md, a/1.png, a/x/a.TXT and 5 "
        "others; expected <domain>/<class>/<image> of the kinds that Pillow reads, such as .jpg and .png"
    ]
    # Nothing is said about domains that are not asked for.
    write(root / "b" / "1.png")
    assert len(load(root, domains=["a"]).notes) == 1


@pytest.mark.parametrize("layout", ["{split}/{domain}", "{domain}/{split}"])
def test_other_splits_are_left_out_with_a_word(make_tree, layout: str) -> None:
    root = make_tree({layout.format(split=split, domain="a") + "/x": [""] for split in SPLITS})
    write(root / layout.format(split="val", domain="a") / "x" / "0.png")
    write(root / "test" / "b" / "x" / "1.png") if layout.startswith("{split}") else None
    (note,) = load(root).notes
    assert "left out " + ("1 .png: a/val/x/0.png" if layout.startswith("{domain}") else "2 .png: ") in note


@pytest.mark.parametrize("suffix", ["AVIF", "JPG", "bmp", "gif", "jfif", "jp2", "png", "pgm", "tga", "tiff", "webp"])
def test_images_of_every_kind_of_pillow_are_read(make_tree, suffix: str) -> None:
    root = make_tree({"a": ["x"]}, suffix=suffix, mode="L" if suffix == "pgm" else "RGB")
    data = load(root)
    assert (len(data), data.notes) == (5, [])
    pixels = preprocess(data, preprocessing_for(".", SimpleNamespace(num_channels=3), 8)).pixels
    assert len({row.tobytes() for row in pixels.gather(torch.arange(5), torch.device("cpu")).numpy()}) == 5


@pytest.mark.parametrize("suffix", ["eps", "h5", "mpg", "wmf"])
def test_what_pillow_does_not_decode_itself_is_left_out(make_tree, suffix: str) -> None:
    root = make_tree({"a": ["x"]})
    write(root / "a" / "x" / f"0.{suffix}")
    (note,) = load(root).notes
    assert f"left out 1 .{suffix}: a/x/0.{suffix};" in note


@pytest.mark.parametrize("layout", ["{split}/{domain}", "{domain}/{split}"])
def test_train_and_test_folders_are_the_split(make_tree, tmp_path: Path, layout: str) -> None:
    folders = {(split, domain): layout.format(split=split, domain=domain) for split in SPLITS for domain in "ab"}
    # `train` is a class of DomainNet and NICO++.
    root = make_tree({folder: ["train", "x"] for folder in folders.values()}, count=3)
    (root / layout.format(split="test", domain="b") / "x" / "2.png").unlink()
    data = load(root)
    assert (data.domains, data.classes) == (["a", "b"], ["train", "x"])
    for part, split in zip((data.train, data.test), SPLITS, strict=True):
        for image, domain in zip(encoded(part), part.domain_of, strict=True):
            assert str(Path(image["path"]).parent.parent.relative_to(root)) == folders[split, data.domains[domain]]
    assert (len(data.train), len(data.test)) == (12, 11)
    assert load(root, domains=["b"]).domains == ["b"]


def test_a_class_named_train_is_no_split(make_tree) -> None:
    assert load(make_tree({"a": ["train", "bus"]})).classes == ["bus", "train"]


def test_spaces_in_names_are_kept(make_tree) -> None:
    data = load(make_tree({"art painting": ["hot dog", "x"]}))
    assert (data.domains, data.classes) == (["art painting"], ["hot dog", "x"])


def test_missing_and_empty_folders_are_named(make_tree, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.root: found no folder '.*nowhere'"):
        load(tmp_path / "nowhere")
    (tmp_path / "bare").mkdir()
    with pytest.raises(InputError, match=r"data\.root: found no folders in '.*bare', expected one for each domain"):
        load(tmp_path / "bare")
    root = make_tree({"a": ["x"]})
    (root / "b").mkdir()
    with pytest.raises(InputError, match=r"data\.root: found no folders in '.*b', expected one for each class"):
        load(root)
    (root / "b" / "x").mkdir()
    with pytest.raises(InputError, match=r"data\.root: found no images directly in '.*b/x', expected files of"):
        load(root)
    with pytest.raises(InputError, match=r"data\.domains: found 'z', expected some of .*'a', 'b'"):
        load(root, domains=["z"])


@pytest.mark.parametrize("split", [False, True])
def test_a_root_at_the_wrong_level_is_told_which_folder_fits(make_tree, tmp_path: Path, split: bool) -> None:
    root = make_tree({"a/train": ["x"], "b/train": ["x"], "a/test": ["x"], "b/test": ["x"]} if split else DOMAINS)
    domain = root / "a" / "train" if split else root / "a"
    too_deep = {domain: "found no folders in '.*x', expected one for each class", domain / "x": "found no folders in"}
    for folder, found in too_deep.items():
        # Folders of splits are two levels below that of the domains.
        near = "" if split and folder != domain else rf" \(did you mean '{root}'\?\)"
        with pytest.raises(InputError, match=rf"{found}.* \(it has images, as a class has\){near}$"):
            load(folder)
    expected = rf"directly in '.*', expected .* skip \(it has folders, as a domain has\) \(did you mean '{root}'\?\)$"
    with pytest.raises(InputError, match=expected):
        load(tmp_path)
    with pytest.raises(InputError, match=rf"expected some in every domain \(did you mean '{root}'\?\)$"):
        load_source(DataConfig("image_folder", str(tmp_path), unreadable="skip"), 0)


@pytest.mark.parametrize("name", ["..", "../images/a", "a/", "./a", "", "."])
def test_a_domain_is_the_name_of_a_folder_and_no_path(make_tree, name: str) -> None:
    root = make_tree({"a": ["x"], "b": ["x"]})
    for domain in (name, str(root / "a")):
        with pytest.raises(InputError, match=r"data\.domains: found '.*', expected some of those in .*'a', 'b'"):
            load(root, domains=[domain])


def test_domains_and_classes_may_be_links(make_tree, tmp_path: Path) -> None:
    root = make_tree({"a": ["x"]})
    (root / "a").rename(tmp_path / "elsewhere")
    (root / "a").symlink_to(tmp_path / "elsewhere")
    (root / "a" / "y").symlink_to(root / "a" / "x")
    data = load(root, domains=["a"])
    assert (len(data), data.notes) == (10, [])


def test_classes_without_images_are_skipped_on_demand(make_tree) -> None:
    root = make_tree({"a": ["x", "y"], "b": ["x"]})
    (root / "b" / "z").mkdir()
    skip = DataConfig("image_folder", str(root), unreadable="skip")
    data = load_source(skip, 0)
    assert (data.classes, data.domains, len(data)) == (["x", "y"], ["a", "b"], 15)
    assert data.notes == [f"{root / 'b' / 'z'}: skipped, it has no images"]
    (root / "c" / "x").mkdir(parents=True)
    with pytest.raises(InputError, match=r"data\.root: found no training samples of domain 'c'"):
        load_source(skip, 0)
    with pytest.raises(InputError, match=r"data\.root: found no images below '.*', expected some"):
        load_source(replace(skip, domains=["c"]), 0)


@pytest.mark.parametrize("name", ["images", "a", "x"])
def test_folders_that_may_not_be_listed_are_named(make_tree, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    root = make_tree({"a": ["x"]})
    listing = Path.iterdir

    def guarded(folder: Path) -> Iterator[Path]:
        # The tests may run as a user whom no permission binds.
        if folder.name == name:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        return listing(folder)

    monkeypatch.setattr(Path, "iterdir", guarded)
    with pytest.raises(InputError, match=rf"data\.root: cannot list .*{name}: Permission denied; expected a readable"):
        load(root)


@pytest.mark.skipif(sys.platform != "linux", reason="names are whatever bytes on Linux only")
@pytest.mark.parametrize("name", [b"a/caf\xe9/0.png", b"a/x/caf\xe9.png"])
def test_names_that_are_no_utf_8_are_reported(make_tree, name: bytes) -> None:
    root = make_tree({"a": ["x"]})
    file = os.fsencode(root) + b"/" + name
    os.makedirs(os.path.dirname(file), exist_ok=True)
    shutil.copy(root / "a" / "x" / "0.png", file)
    with pytest.raises(InputError, match=r"^data\.root: found '.*caf\\udce9.*', expected a name that is UTF-8 text"):
        load(root)


@pytest.mark.skipif(PACS is None, reason="FEDRA_PACS names no folder with PACS")
def test_pacs_has_its_domains_classes_and_images() -> None:
    data = load(Path(str(PACS)))
    assert data.domains == ["art_painting", "cartoon", "photo", "sketch"]
    assert len(data.classes) == 7
    assert len(data.train) + len(data.test) == 2780
    some = data.test.select(np.arange(0, len(data.test), 20))
    store = preprocess(some, preprocessing_for(".", SimpleNamespace(num_channels=3), 112))
    assert store.pixels.gather(torch.arange(len(store)), torch.device("cpu")).shape == (len(some), 3, 112, 112)
