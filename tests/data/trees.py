"""Small data sets in the on-disk layouts of the published ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

DOMAINNET = ["clipart", "infograph", "painting", "quickdraw", "real", "sketch"]
NICOPP = ["autumn", "dim", "grass", "outdoor", "rock", "water"]
PACS = ["art_painting", "cartoon", "photo", "sketch"]


def save_image(path: Path, rng: np.random.Generator) -> None:
    """Random pixels, 12 × 10, in whatever kind of file `path` says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(256, size=(10, 12, 3), dtype=np.uint8)).save(path)


def make_domainnet(root: Path, classes: list[str], train: int = 6, test: int = 2) -> Path:
    """`<root>/<domain>/<class>/<domain>_<class number>_<number>.jpg` and `<root>/splits/<domain>_{train,test}.txt`."""
    rng = np.random.default_rng(0)
    (root / "splits").mkdir(parents=True)
    for domain in DOMAINNET:
        lines: dict[str, list[str]] = {"train": [], "test": []}
        for label, name in enumerate(classes):
            for number in range(train + test):
                path = f"{domain}/{name}/{domain}_{label + 1:03}_{number:06}.jpg"
                save_image(root / path, rng)
                lines["train" if number < train else "test"].append(f"{path} {label}\n")
        for split, content in lines.items():
            (root / "splits" / f"{domain}_{split}.txt").write_text("".join(content))
    return root


def make_pacs(root: Path, count: int = 30) -> Path:
    """`<root>/<domain>/<class>/pic_<number>.jpg`, seven classes."""
    rng = np.random.default_rng(0)
    for domain in PACS:
        for name in ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person"):
            for number in range(count):
                save_image(root / domain / name / f"pic_{number:03}.jpg", rng)
    return root


def make_nicopp(root: Path, classes: list[str], train: int = 6, test: int = 2) -> Path:
    """`<root>/NICO_DG/<domain>/<class>/<domain>_<number>.jpg` and `<root>/NICO_DG_official/<domain>_{train,test}.txt`.

    Classes may have spaces, as there.
    """
    rng = np.random.default_rng(0)
    (root / "NICO_DG_official").mkdir(parents=True)
    for domain in NICOPP:
        lines: dict[str, list[str]] = {"train": [], "test": []}
        for label, name in enumerate(classes):
            for number in range(train + test):
                path = f"NICO_DG/{domain}/{name}/{domain}_{number:06}.jpg"
                save_image(root / path, rng)
                lines["train" if number < train else "test"].append(f"{path} {label}\n")
        for split, content in lines.items():
            (root / "NICO_DG_official" / f"{domain}_{split}.txt").write_text("".join(content))
    return root
