"""What the accuracy study reads: images and a model, from their own folders or from a pack of both."""

from __future__ import annotations

import json
import re
import shutil
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import save_file
from transformers import AutoConfig

from benchmarks.accuracy.planes import from_planes
from benchmarks.accuracy.sheets import from_sheet
from fedra_engine.config import DataConfig
from fedra_engine.data.domain_data import DomainData
from fedra_engine.data.images import UnreadableImageError, decode_image, decoding_threads
from fedra_engine.data.preprocessing import PREPROCESSOR_FILE, PROCESSOR_FILE, Preprocessing, preprocessing_for
from fedra_engine.data.sources.image_files import read_image_folder
from fedra_engine.runtime.errors import InputError
from fedra_engine.runtime.files import content_hash

FORMAT = 1
"""Goes up whenever older packs cannot be read any more."""
INDEX_FILE = "pack.json"
EXPONENTS_FILE = "exponents.deflate"
MANTISSAS_FILE = "mantissas.bin"
WEIGHTS_FILE = "model.safetensors"
MODEL_FILES = ("config.json", PREPROCESSOR_FILE, PROCESSOR_FILE)
"""Files of a model's folder that are read besides its weights; the last two need not be there."""


@dataclass(frozen=True)
class StudyImages:
    """Decoded images of a folder or a pack, before any test set is drawn.

    Attributes:
        data: the samples.
        is_split: whether the folders say which samples are for testing.
    """

    data: DomainData
    is_split: bool

    @property
    def image_size(self) -> int:
        """Side in pixels."""
        return int(self.data.content.shape[-1])

    def digest(self) -> str:
        """A hash of pixels, labels, names and split: equal for equal images."""
        data = self.data
        assert data.labels is not None
        names = repr((data.domains, data.classes, self.is_split)).encode()
        arrays = (data.content, data.labels, data.domain_of, data.is_test)
        return content_hash(names + b"".join(array.tobytes() for array in arrays)).hexdigest()


def is_pack(folder: Path) -> bool:
    """Whether `pack` wrote this folder."""
    return (folder / INDEX_FILE).is_file()


def read_images(images: Path, model: Path, image_size: int) -> StudyImages:
    """The images of a pack, or of a folder <domain>/<class>/<image> resized as the folder `model` wants them.

    Raises:
        InputError: images that are missing, damaged or of another size.
    """
    if is_pack(images):
        found = _packed_images(images)
        if found.image_size != image_size:
            raise InputError(f"images: found a pack at {found.image_size} pixels, expected one at {image_size}")
        return found
    preprocessing = preprocessing_for(str(model), model_config(model), image_size)
    config = DataConfig("image_folder", str(images))
    try:
        data, is_split = read_image_folder(config, partial(decode_files, preprocessing=preprocessing))
    except InputError as error:
        # A user of the study knows the folder by another name than one who writes a configuration.
        raise InputError(re.sub(r"^data\.root:", "images:", str(error))) from error
    return StudyImages(data, is_split)


def decode_files(paths: Sequence[str], preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """Decode and resize the image files `paths`.

    Raises:
        InputError: a file that cannot be read or decoded.
    """
    pixels = np.empty((len(paths), *preprocessing.shape), dtype=np.uint8)

    def decode(row: int) -> None:
        try:
            pixels[row] = decode_image({"path": paths[row]}, preprocessing)
        except (UnreadableImageError, OSError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"data.root: cannot read {paths[row]}: {reason}; expected a readable file") from error

    with decoding_threads() as pool:
        for _ in pool.map(decode, range(len(paths))):
            pass
    return pixels


@contextmanager
def model_folder(model: Path) -> Iterator[Path]:
    """A folder that transformers can load: `model` itself, or one for as long as this lasts with the model of a pack.

    Raises:
        InputError: a pack that is damaged.
    """
    if not is_pack(model):
        yield model
        return
    with TemporaryDirectory(prefix="fedra_model_") as folder:
        _unpack_model(model, Path(folder))
        yield Path(folder)


def model_config(model: Path) -> Any:
    """The transformers configuration in a model's folder.

    Raises:
        InputError: there is none.
    """
    if not (model / "config.json").is_file():
        raise InputError(f"model: found no config.json in {model}, expected a model directory or a pack")
    return AutoConfig.from_pretrained(model)


def _packed_images(pack: Path) -> StudyImages:
    index = _read_index(pack)["images"]
    side, channels = index["image_size"], index["channels"]
    counts = [len(domain["labels"]) for domain in index["domains"]]
    sheets = [
        from_sheet(_read_checked(pack, domain["file"], domain["crc32"]), count, channels, side)
        for domain, count in zip(index["domains"], counts, strict=True)
    ]
    data = DomainData(
        task="image_classification",
        content=np.concatenate(sheets),
        domain_of=np.repeat(np.arange(len(counts)), counts),
        domains=[domain["name"] for domain in index["domains"]],
        labels=np.concatenate([np.array(domain["labels"]) for domain in index["domains"]]),
        classes=index["classes"],
        is_test=np.concatenate([np.array(domain["is_test"], dtype=np.bool_) for domain in index["domains"]]),
    )
    return StudyImages(data, index["is_split"])


def _unpack_model(pack: Path, folder: Path) -> None:
    index = _read_index(pack)["model"]
    exponents, mantissas = (
        _read_checked(pack, file, index["crc32"][file]) for file in (EXPONENTS_FILE, MANTISSAS_FILE)
    )
    names, shapes = zip(*index["tensors"], strict=True)
    tensors = from_planes(exponents, mantissas, shapes)
    save_file(dict(zip(names, tensors, strict=True)), folder / WEIGHTS_FILE, {"format": "pt"})
    for name in MODEL_FILES:
        if (pack / name).is_file():
            shutil.copyfile(pack / name, folder / name)


def _read_index(pack: Path) -> dict[str, Any]:
    index: dict[str, Any] = json.loads((pack / INDEX_FILE).read_text())
    if index["format"] != FORMAT:
        raise InputError(f"{pack / INDEX_FILE}: found format {index['format']}, expected {FORMAT}: pack again")
    return index


def _read_checked(pack: Path, name: str, crc32: int) -> bytes:
    path = pack / name
    content = path.read_bytes() if path.is_file() else b""
    if zlib.crc32(content) != crc32:
        raise InputError(f"{path}: found other bytes than were packed, expected them all: pack again")
    return content
