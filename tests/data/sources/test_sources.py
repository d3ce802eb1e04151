"""The embedded source, whole and restricted to some domains; sources that users register; data sets in memory."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value

from fedra_engine.config import ColumnsConfig, DataConfig, ExperimentConfig
from fedra_engine.config.validation import validate
from fedra_engine.data.domain_data import DomainData
from fedra_engine.data.preprocessing import Preprocessing
from fedra_engine.data.sources import dataset_source, load_source, register_source
from fedra_engine.runtime.errors import InputError
from tests.data.preprocessed import preprocess


def test_digits_have_their_domains_and_classes() -> None:
    data = load_source(DataConfig(), seed=0)
    assert len(data.domains) == 6
    assert data.classes == [str(digit) for digit in range(10)]
    assert set(data.train.domain_of) == set(range(6))


def test_chosen_digits_domains_are_the_same_images_in_the_given_order() -> None:
    everything = load_source(DataConfig(), seed=0)
    chosen = [everything.domains[3], everything.domains[0]]
    data = load_source(DataConfig(domains=chosen), seed=0)
    assert data.domains == chosen
    for index, name in enumerate(chosen):
        test = everything.test
        expected = test.select(np.flatnonzero(test.domain_of == everything.domains.index(name)))
        found = data.test.select(np.flatnonzero(data.test.domain_of == index))
        assert found.labels.tolist() == expected.labels.tolist()
        assert isinstance(found.content, np.ndarray)
        assert np.array_equal(found.content, expected.content)


def test_an_unknown_domain_is_named() -> None:
    with pytest.raises(InputError, match=r"data\.domains: found 'marble', expected some of 'clean'"):
        load_source(DataConfig(domains=["clean", "marble"]), seed=0)


@pytest.mark.usefixtures("own_names")
def test_a_registered_source_is_loaded_by_its_name() -> None:
    @register_source("few_digits")
    def few_digits(config: DataConfig, seed: int) -> DomainData:
        assert seed == 5
        return load_source(replace(config, source="digits", domains=["noisy"]), seed)

    validate(ExperimentConfig(data=DataConfig("few_digits")))
    assert load_source(DataConfig("few_digits"), seed=5).domains == ["noisy"]
    validate(ExperimentConfig(data=DataConfig("few_digits")))
    with pytest.raises(InputError, match=r"^data\.source: found a second digits to register, expected a name"):
        register_source("digits")


def rows(count: int, first: int = 0) -> Dataset:
    """Texts of two domains and two classes; the client owns every third."""
    numbers = range(first, first + count)
    return Dataset.from_dict(
        {
            "body": [f"text {number}" for number in numbers],
            "mood": [number % 2 for number in numbers],
            "domain": ["news" if number % 4 < 2 else "mail" for number in numbers],
            "client": [f"c{number % 3}" for number in numbers],
        }
    )


BODY = ColumnsConfig(input="body", label="mood")


def test_a_data_set_in_memory_is_as_the_same_one_on_disk(tmp_path: Path) -> None:
    for dataset in (rows(40), DatasetDict(train=rows(32), test=rows(8, first=32))):
        dataset.save_to_disk(tmp_path / type(dataset).__name__)
        config = DataConfig("hf_dataset", str(tmp_path / type(dataset).__name__), columns=BODY)
        found, expected = dataset_source(dataset, DataConfig(columns=BODY), 3), load_source(config, 3)
        assert (found.task, found.domains, found.classes) == ("text_classification", ["mail", "news"], ["0", "1"])
        for name in ("domain_of", "labels", "is_test", "clients", "sample_sources"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
        assert list(found.content["text"]) == list(expected.content["text"])
        assert len(found.test) == 8


def test_images_in_memory_are_decoded_once_and_never_taken_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def pictures(seed: int) -> Dataset:
        pixels = np.random.default_rng(seed).integers(256, size=(8, 4, 4), dtype=np.uint8)
        features = Features(image=Image(), label=ClassLabel(names=["cat", "dog"]))
        return Dataset.from_dict({"image": list(pixels), "label": [0, 1] * 4}, features=features)

    def pixels(seed: int) -> np.ndarray:
        store = preprocess(dataset_source(pictures(seed), DataConfig(), 0), Preprocessing(4, 1, (0.5,), (0.5,)))
        return store.pixels.gather(torch.arange(8), torch.device("cpu"))[:, 0].numpy()

    for seed in range(2):
        np.testing.assert_array_equal(pixels(seed), np.stack(list(map(np.asarray, pictures(seed)["image"]))))
    monkeypatch.setattr("fedra_engine.data.images.PillowImage.open", lambda *_, **__: pytest.fail("decoded again"))
    pixels(1)


def test_texts_in_memory_are_learnt_where_the_source_says_so() -> None:
    config = DataConfig("causal_lm", columns=replace(BODY, response="mood"), prompt="{body}?")
    data = dataset_source(rows(12), config, 0)
    assert data.task == "causal_lm"
    assert sorted(data.content["prompt"]) == sorted(f"text {number}?" for number in range(12))


@pytest.mark.parametrize(
    ("dataset", "config", "message"),
    [
        (DatasetDict(a=rows(4), b=rows(4)), DataConfig(columns=BODY), "found the splits 'a', 'b', expected one named"),
        (
            DatasetDict(train=rows(4).select([0, 2]), test=rows(4)),
            DataConfig(columns=BODY),
            "found the classes '1' in the test set alone",
        ),
        (
            DatasetDict(train=rows(4), test=rows(4).remove_columns("mood")),
            DataConfig(columns=BODY),
            "column 'mood' of the test split: found no such column",
        ),
        (
            Dataset.from_dict({"text": ["a", None]}),
            DataConfig("causal_lm"),
            "train, row 1: found no text in column 'text', expected some, or data.unreadable skip",
        ),
        ([1], DataConfig(), "found a list, expected a Dataset or DatasetDict of the datasets library"),
    ],
)
def test_what_is_wrong_with_a_data_set_in_memory_is_said_of_it(
    dataset: object, config: DataConfig, message: str
) -> None:
    with pytest.raises(InputError, match=f"^dataset: {re.escape(message)}"):
        dataset_source(dataset, config, 0)


def test_an_image_in_memory_that_cannot_be_decoded_is_said_of_the_data_set() -> None:
    features = Features(image=Image(), label=Value("int64"))
    broken = [{"bytes": b"hello", "path": None}] * 4
    data = dataset_source(Dataset.from_dict({"image": broken, "label": [0, 1] * 2}, features=features), DataConfig(), 0)
    with pytest.raises(InputError, match=r"^dataset: cannot read train, row 0: cannot identify"):
        preprocess(data, Preprocessing(4, 1, (0.5,), (0.5,)))
