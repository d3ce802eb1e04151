"""What a large data set takes of memory: an index. Its images and texts stay on disk."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow
import pytest
import torch

from fedra_engine.config import DataConfig
from fedra_engine.data import cache as cache_module
from fedra_engine.data.cache import store_texts
from fedra_engine.data.preprocessing import Preprocessing
from fedra_engine.data.samples import PreparedData, prepare
from fedra_engine.data.sources import load_source
from tests.data.preprocessed import preprocess
from tests.data.tokenizers import save_decoder_tokenizer
from tests.data.trees import save_image

pytestmark = pytest.mark.slow

IMAGE_SIZE = 32
INDEX_BYTES = 2000
"""Most memory for a sample's path, line, label and place, with what reading leaves behind. An image's pixels take 3072,
a text here 4000."""


def make_long_lists(root: Path, count: int) -> Path:
    """DomainNet with one domain and one class of `count` images, all of them one file."""
    first = root / "one.png"
    save_image(first, np.random.default_rng(0))
    (root / "real" / "bus").mkdir(parents=True)
    (root / "splits").mkdir()
    paths = [f"real/bus/real_024_{number:06}.png" for number in range(count)]
    for path in paths:
        os.link(first, root / path)
    for split, some in (("train", paths[10:]), ("test", paths[:10])):
        (root / "splits" / f"real_{split}.txt").write_text("".join(f"{path} 0\n" for path in some))
    return root


def private_bytes() -> int:
    """Resident memory of this process that no file backs."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("RssAnon:")[2].split()[0])


def make_long_texts(root: Path, count: int) -> Path:
    """One file of `count` different texts of 2000 words, beside a tokenizer."""
    save_decoder_tokenizer(root)
    with (root / "texts.jsonl").open("w") as file:
        for number in range(count):
            file.write(json.dumps({"text": " ".join(f"{number:013b}") + " a" * 1987}) + "\n")
    return root


def load_images(root: Path, cache: Path) -> PreparedData:
    """Loaded, prepared, and drawn through once."""
    datasets.config.HF_DATASETS_CACHE = cache
    # As many images as a part has that are of common size.
    cache_module.PART_BYTES = 900 * 3 * IMAGE_SIZE**2
    config = DataConfig("domainnet", str(root), image_size=IMAGE_SIZE)
    prepared = prepare(load_source(config, 0), config, str(root), type("Config", (), {"num_channels": 3}))
    return draw_through(prepared)


def load_texts(root: Path, cache: Path) -> PreparedData:
    """Loaded, prepared, and drawn through once."""
    datasets.config.HF_DATASETS_CACHE = cache
    config = DataConfig("causal_lm", str(root / "texts.jsonl"))
    return draw_through(prepare(load_source(config, 0), config, str(root), SimpleNamespace(model_type="llama")))


def draw_through(prepared: PreparedData) -> PreparedData:
    for rows in torch.randperm(len(prepared.train.domains)).split(100):
        prepared.train.batch(rows, torch.device("cpu"), torch.float32)
    return prepared


def memory_of_each(load: Callable[[Path, Path], PreparedData], roots: list[Path], cache: Path) -> list[int]:
    """What each data set takes of private memory while it is there."""
    kept, marks = [], [private_bytes()]
    for root in roots:
        kept.append(load(root, cache))
        gc.collect()
        marks.append(private_bytes())
    return np.diff(marks).tolist()


def test_stored_images_are_in_memory_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many of them a part of the cache has: they may be many times as large as what is made of them."""
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    save_image(tmp_path / "one.png", np.random.default_rng(0))
    # A decoder does not look behind the image.
    encoded = (tmp_path / "one.png").read_bytes() + bytes(100_000)
    features = datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))
    rows = {"image": [{"bytes": encoded, "path": None}] * 400, "label": [0, 1] * 200}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
    config = DataConfig("hf_dataset", str(tmp_path / "saved"))
    data = load_source(config, 0)
    pool = pyarrow.proxy_memory_pool(pyarrow.system_memory_pool())
    usual = pyarrow.default_memory_pool()
    pyarrow.set_memory_pool(pool)
    tracemalloc.start()
    try:
        preprocess(data, Preprocessing(8, 3, (0.5,) * 3, (0.5,) * 3))
        peak = tracemalloc.get_traced_memory()[1] + pool.max_memory()
    finally:
        tracemalloc.stop()
        pyarrow.set_memory_pool(usual)
    assert peak < 400 * len(encoded) / 4


def test_long_texts_do_not_wait_in_memory_to_be_written() -> None:
    tracemalloc.start()
    try:
        stored = store_texts(["text"], ([f"{number:1000000}"] for number in range(100)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(stored) == 100
    assert peak < 25e6


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize(
    ("make", "load", "few", "many"),
    [(make_long_lists, load_images, 500, 10_000), (make_long_texts, load_texts, 500, 5000)],
    ids=["images", "texts"],
)
def test_a_sample_more_costs_its_entry_in_the_index(
    tmp_path: Path, make: Callable[[Path, int], Path], load: Callable[[Path, Path], PreparedData], few: int, many: int
) -> None:
    small, large = (make(tmp_path / str(count), count) for count in (few, many))
    for root in (small, large):
        # Decodes or tokenizes.
        load(root, tmp_path / "cache")
    # A fresh process has no memory left over from other tests, which could hide some. What the lines of the lists take
    # while they are read is used again, so the first loading is not counted.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        # On a busy machine, one loading may leave more behind than another.
        _, first, *second = pool.apply(memory_of_each, (load, [large, small, large, large], tmp_path / "cache"))
        pool.close()
        pool.join()
    assert min(second) - max(first, 0) < INDEX_BYTES * (many - few)
