"""Put images and a model into one small folder, for a machine that has neither.

The folder holds the images resized and the weights in bf16, both without loss: a study reads the same bytes from it as
from the folders it was made of.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.accuracy.inputs import (
    EXPONENTS_FILE,
    FORMAT,
    INDEX_FILE,
    MANTISSAS_FILE,
    MODEL_FILES,
    StudyImages,
    is_pack,
    read_images,
)
from benchmarks.accuracy.planes import to_planes
from benchmarks.accuracy.sheets import to_sheet
from fedra_engine.runtime.errors import InputError, printable
from fedra_engine.runtime.files import check_unused

LIMIT_MIB = 50.0
"""Largest pack; small enough to upload with the repository."""
_MIB = 2**20


def pack(
    images: Path, model: Path, output: Path, *, image_size: int = 56, limit_mib: float = LIMIT_MIB
) -> dict[str, int]:
    """Write the folder `output` with all that `run_study` reads, and print the size of each file.

    Args:
        images: folder <domain>/<class>/<image>.
        model: a transformers folder with weights in safetensors.
        output: a new or empty folder.
        image_size: side in pixels to which images are resized.
        limit_mib: most MiB of all files together; nothing is written above it.

    Returns:
        Bytes of each file by name.

    Raises:
        InputError: images or a model that cannot be read, a pack above the limit, or a folder that is in use.
    """
    for name, folder in (("images", images), ("model", model)):
        if is_pack(folder):
            raise InputError(f"{name}: found a pack in {folder}, expected what a pack is made of")
    check_unused("pack", output)
    image_index, image_files = _pack_images(read_images(images, model, image_size))
    model_index, model_files = _pack_model(model)
    index = {"format": FORMAT, "images": image_index, "model": model_index}
    files = {INDEX_FILE: json.dumps(index, separators=(",", ":")).encode()} | model_files | image_files
    sizes = {name: len(content) for name, content in files.items()}
    total = sum(sizes.values())
    if total > limit_mib * _MIB:
        of_images = sum(map(len, image_files.values()))
        raise InputError(
            f"--limit: found a pack of {total / _MIB:.1f} MiB, {of_images / _MIB:.1f} of them images, expected at "
            f"most {limit_mib:g} (fewer images, or a higher --limit)"
        )
    output.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (output / name).write_bytes(content)
        print(f"{sizes[name] / _MIB:8.2f} MiB  {name}")
    print(f"{total / _MIB:8.2f} MiB  in {len(files)} files in {printable(str(output))}")
    return sizes


def _pack_images(images: StudyImages) -> tuple[dict[str, Any], dict[str, bytes]]:
    """What `pack.json` says of the images, and a sheet for each domain."""
    data = images.data
    domains: list[dict[str, Any]] = []
    files: dict[str, bytes] = {}
    assert data.labels is not None
    for domain, name in enumerate(data.domains):
        rows = data.domain_of == domain
        file = f"images_{domain}.webp"
        files[file] = to_sheet(data.content[rows])
        domains.append(
            {
                "name": name,
                "file": file,
                "crc32": zlib.crc32(files[file]),
                "labels": data.labels[rows].tolist(),
                "is_test": data.is_test[rows].astype(int).tolist(),
            }
        )
    index = {
        "image_size": images.image_size,
        "channels": data.content.shape[1],
        "classes": data.classes,
        "is_split": images.is_split,
        "domains": domains,
    }
    return index, files


def _pack_model(model: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """What `pack.json` says of the model, and its files."""
    tensors = _read_weights(model)
    exponents, mantissas = to_planes([tensor.to(torch.bfloat16) for tensor in tensors.values()])
    planes = {EXPONENTS_FILE: exponents, MANTISSAS_FILE: mantissas}
    index = {
        "tensors": [[name, list(tensor.shape)] for name, tensor in tensors.items()],
        "crc32": {name: zlib.crc32(content) for name, content in planes.items()},
    }
    settings = {name: (model / name).read_bytes() for name in MODEL_FILES if (model / name).is_file()}
    return index, settings | planes


def _read_weights(model: Path) -> Mapping[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in sorted(model.glob("*.safetensors")):
        tensors |= load_file(file)
    if not tensors:
        raise InputError(f"model: found no weights (*.safetensors) in {model}, expected a transformers model directory")
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise InputError(f"model: found {name} of {tensor.dtype} in {model}, expected floating-point weights only")
    return tensors
