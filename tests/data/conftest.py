"""Folders of images to load."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

MakeTree = Callable[..., Path]


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoded images go where no other test finds them."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def make_tree(tmp_path: Path) -> MakeTree:
    """A function that writes `count` images for each class of each domain and returns the root."""

    def make(tree: dict[str, list[str]], count: int = 5, suffix: str = "png", mode: str = "RGB") -> Path:
        rng = np.random.default_rng(0)
        root = tmp_path / "images"
        for domain, classes in tree.items():
            for name in classes:
                folder = root / domain / name
                folder.mkdir(parents=True)
                for index in range(count):
                    pixels = rng.integers(256, size=(10, 12, 3), dtype=np.uint8)
                    Image.fromarray(pixels).convert(mode).save(folder / f"{index}.{suffix}")
        return root

    return make
