"""Images that are decoded before they become a source's content."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from benchmarks.accuracy.inputs import decode_files
from fedra_engine.config import DataConfig
from fedra_engine.data.domain_data import prepare_source
from fedra_engine.data.preprocessing import Preprocessing
from fedra_engine.data.sources.image_files import load_image_folder, read_image_folder
from fedra_engine.runtime.errors import InputError
from tests.data.preprocessed import preprocess

PREPROCESSING = Preprocessing(6, 3, (0.5,) * 3, (0.5,) * 3)


def test_they_are_the_samples_and_the_pixels_of_the_cache(make_tree) -> None:
    config = DataConfig("image_folder", str(make_tree({"b": ["x", "y"], "a": ["x"]})))
    cached = load_image_folder(config, 3)
    read, is_split = read_image_folder(config, partial(decode_files, preprocessing=PREPROCESSING))
    decoded = prepare_source(read, config, 3, split=not is_split)
    for name in ("labels", "domain_of", "is_test"):
        assert np.array_equal(getattr(cached, name), getattr(decoded, name))
    rows = torch.arange(len(cached.train))
    found, expected = (preprocess(data.train, PREPROCESSING) for data in (decoded, cached))
    assert torch.equal(*(store.pixels.gather(rows, torch.device("cpu")) for store in (found, expected)))


def test_the_digest_of_images_is_of_what_the_model_sees(make_tree) -> None:
    config = DataConfig("image_folder", str(make_tree({"b": ["x", "y"], "a": ["x"]})))
    cached = load_image_folder(config, 3)
    read, is_split = read_image_folder(config, partial(decode_files, preprocessing=PREPROCESSING))
    decoded = prepare_source(read, config, 3, split=not is_split)
    digest = preprocess(cached.train, PREPROCESSING).digest()
    assert preprocess(decoded.train, PREPROCESSING).digest() == digest
    assert preprocess(cached.train, PREPROCESSING).digest() == digest
    decoded.content[np.flatnonzero(~decoded.is_test)[-1], 0, 0, 0] ^= 1
    assert preprocess(decoded.train, PREPROCESSING).digest() != digest
    assert preprocess(cached.train, replace(PREPROCESSING, std=(0.5, 0.5, 0.4))).digest() != digest


def test_a_file_that_is_no_image_is_named(make_tree) -> None:
    root = make_tree({"a": ["x"]})
    (root / "a" / "x" / "2.png").write_text("no image")
    paths = [str(path) for path in sorted(root.rglob("*.png"))]
    with pytest.raises(
        InputError, match=r"data\.root: cannot read .*2\.png: cannot identify image file .*; expected a"
    ):
        decode_files(paths, PREPROCESSING)
    with pytest.raises(InputError, match=r"cannot read none\.png: No such file or directory"):
        decode_files(["none.png"], PREPROCESSING)


def test_pixels_of_another_size_are_refused(make_tree) -> None:
    config = DataConfig("image_folder", str(make_tree({"a": ["x"]})))
    data, _ = read_image_folder(config, partial(decode_files, preprocessing=PREPROCESSING))
    with pytest.raises(
        InputError, match=r"data\.image_size: found decoded images of \(3, 6, 6\), expected \(3, 8, 8\)"
    ):
        preprocess(data, Preprocessing(8, 3, (0.5,) * 3, (0.5,) * 3))
