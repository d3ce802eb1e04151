"""Validation samples: taken out of the training set, and evaluated in the place of the test set."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from numpy.typing import NDArray

from fedra_engine.callbacks.fingerprint import setting_digest
from fedra_engine.config import DataConfig, ExperimentConfig
from fedra_engine.data.domain_data import DomainData, with_validation
from fedra_engine.data.partition import partition_samples
from fedra_engine.experiment import build_experiment
from fedra_engine.inputs import Inputs
from fedra_engine.runtime.errors import InputError
from tests.data.text_files import write
from tests.data.trees import make_domainnet, make_nicopp
from tests.running import small_config


def identified(domains: int = 2, classes: int = 3, train: int = 10, test: int = 4, labelled: bool = True) -> DomainData:
    """Samples whose only pixel is their number; those for testing come last in each class of each domain."""
    shape = (domains, classes, train + test)
    domain_of, labels, place = (index.ravel() for index in np.indices(shape))
    return DomainData(
        task="image_classification",
        content=np.arange(domain_of.size, dtype=np.uint8).reshape(-1, 1, 1, 1),
        domain_of=domain_of,
        domains=[f"d{index}" for index in range(domains)],
        labels=labels if labelled else None,
        classes=[f"c{index}" for index in range(classes)],
        is_test=place >= train,
    )


def numbers(data: DomainData) -> set[int]:
    return set(data.content.ravel().tolist())


def test_every_class_of_every_domain_gives_its_share_of_the_training_samples() -> None:
    data = identified()
    split = with_validation(data, DataConfig(validation_fraction=0.3), seed=0)
    assert np.bincount(3 * split.test.domain_of + split.test.labels).tolist() == [3] * 6
    assert numbers(split.train) | numbers(split.test) == numbers(data.train)
    assert not numbers(split.train) & numbers(split.test)
    assert not numbers(split) & numbers(data.test)


def test_the_draw_depends_on_the_seed_alone_and_is_not_that_of_a_test_set() -> None:
    config = DataConfig(validation_fraction=0.3)
    first, again, other = (numbers(with_validation(identified(), config, seed).test) for seed in (5, 5, 6))
    assert first == again != other


def test_none_is_the_data_as_they_were() -> None:
    data = identified()
    assert with_validation(data, DataConfig(), seed=0) is data


def test_samples_without_labels_are_drawn_by_domain() -> None:
    split = with_validation(identified(labelled=False), DataConfig(validation_fraction=0.1), seed=0)
    assert np.bincount(split.test.domain_of).tolist() == [3, 3]


def test_a_domain_with_one_training_sample_a_class_is_named() -> None:
    with pytest.raises(InputError, match=r"^data\.validation_fraction: found 0\.5 but no validation sample in .*'d0'"):
        with_validation(identified(train=1), DataConfig(validation_fraction=0.5), seed=0)


def loaded(validation_fraction: float, inputs: Inputs | None = None, **settings: object) -> DomainData:
    config = ExperimentConfig(data=DataConfig(**settings, validation_fraction=validation_fraction))
    return (inputs or Inputs()).load_data(config)


def reviews(root: Path) -> dict[str, object]:
    rows = [{"text": f"text {index}", "label": index % 2, "domain": f"d{index // 2 % 2}"} for index in range(40)]
    return {"source": "text_classification", "root": str(write(root / "reviews.jsonl", rows))}


def instructions(root: Path) -> dict[str, object]:
    rows = [{"text": f"text {index}", "domain": f"d{index % 2}"} for index in range(40)]
    return {"source": "causal_lm", "root": str(write(root / "texts.jsonl", rows))}


def split_reviews(root: Path) -> dict[str, object]:
    splits = {
        split: Dataset.from_list([{"text": f"{split} {index}", "label": index % 2} for index in range(20)])
        for split in ("train", "test")
    }
    DatasetDict(splits).save_to_disk(root / "saved")
    return {"source": "hf_dataset", "root": str(root / "saved")}


SOURCES = {
    "digits": lambda root: {"source": "digits"},
    "texts": reviews,
    "language": instructions,
    "hf_dataset": split_reviews,
    "domainnet": lambda root: {"source": "domainnet", "root": str(make_domainnet(root / "d", ["a", "b"], 6, 2))},
    "nicopp": lambda root: {"source": "nicopp", "root": str(make_nicopp(root / "n", ["a", "b"], 6, 2))},
}


def plain(sample: dict[str, object] | NDArray[np.uint8]) -> list[object]:
    """The sample with pixels in place of images, which differ even where their pixels are the same."""
    if isinstance(sample, np.ndarray):
        return list(sample.tolist())
    return [np.asarray(value).tolist() if key == "image" else value for key, value in sample.items()]


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_has_them(tmp_path: Path, source: str) -> None:
    settings = SOURCES[source](tmp_path)
    usual, split = loaded(0.0, **settings), loaded(0.25, **settings)
    assert len(split) == len(usual.train)
    assert len(split.test) == pytest.approx(0.25 * len(usual.train), abs=len(usual.domains) * len(usual.classes or [0]))
    assert set(split.test.domain_of) == set(usual.domain_of)
    rows = [row for row, held_out in enumerate(usual.is_test) if not held_out]
    assert [plain(sample) for sample in split.content] == [plain(usual.content[row]) for row in rows]
    assert split.notes[-1] == (
        f"accuracies are those on {len(split.test):,} validation samples, which are taken out of training; the "
        f"{len(usual.test):,} test samples are not used"
    )


def test_image_folders_and_data_in_memory_have_them(make_tree) -> None:
    settings = {"source": "image_folder", "root": str(make_tree({"a": ["x", "y"], "b": ["x", "y"]}, count=10))}
    assert (len(loaded(0.0, **settings).test), len(loaded(0.25, **settings).test)) == (8, 8)
    assert len(loaded(0.25, **settings)) == 32
    in_memory = loaded(0.2, Inputs(data=identified()))
    assert (len(in_memory), len(in_memory.test)) == (60, 12)


@pytest.mark.parametrize("partition", ["domain", "iid", "dirichlet", "shards", "quantity", "bootstrap"])
def test_every_partition_divides_the_other_samples_alone(partition: str) -> None:
    data = loaded(0.2, partition=partition, clients_per_domain=2, min_samples=1)
    parts = partition_samples(DataConfig(partition=partition, clients_per_domain=2, min_samples=1), data.train, 0)
    assert max(int(rows.max()) for rows in parts.samples) < len(data.train)
    if partition != "bootstrap":
        assert sum(map(len, parts.samples)) == len(data.train)


def test_an_experiment_trains_and_evaluates_them_and_cannot_be_resumed_without(tmp_path: Path) -> None:
    usual = small_config(tmp_path)
    config = replace(usual, data=replace(usual.data, validation_fraction=0.2))
    experiment, before = (build_experiment(each, torch.device("cpu")) for each in (config, usual))
    train, held_out = len(experiment.train_samples), len(experiment.test_samples)
    assert train + held_out == len(before.train_samples)
    of_class = np.bincount(10 * before.train_data.domain_of + before.train_data.labels).tolist()
    assert held_out == sum(min(max(round(0.2 * count), 1), count - 1) for count in of_class)
    assert sum(map(len, experiment.clients.samples)) == train
    assert setting_digest(config) != setting_digest(usual)
