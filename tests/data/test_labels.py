"""Classes: how labels are compared, and test sets whose labels are hidden or spelt otherwise."""

from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from fedra_engine.config import DataConfig
from fedra_engine.data.domain_data import DomainData
from fedra_engine.data.sources import load_source
from fedra_engine.runtime.errors import InputError
from tests.data.conftest import MakeTree
from tests.data.text_files import load, texts, write

Labels = list[object]
Loader = Callable[..., DomainData]


def rows(labels: Labels, split: str) -> list[dict]:
    return [{"text": f"{split} {index}", "label": label} for index, label in enumerate(labels)]


def load_files(root: Path, **splits: Labels) -> DomainData:
    for split, labels in splits.items():
        write(root / f"{split}.jsonl", rows(labels, split))
    return load(root)


def load_folders(root: Path, **splits: Labels) -> DomainData:
    for split, labels in splits.items():
        write(root / split / "books.csv", rows(labels, split))
    return load(root)


def load_saved(root: Path, **splits: Labels) -> DomainData:
    saved = {split: Dataset.from_list(rows(labels, split)) for split, labels in splits.items()}
    DatasetDict(saved).save_to_disk(root)
    return load_source(DataConfig("hf_dataset", str(root)), seed=0)


LOADERS = pytest.mark.parametrize("loader", [load_files, load_folders, load_saved])


@LOADERS
@pytest.mark.parametrize("hidden", [-1, -1.0, "-1", ""])
def test_a_test_set_with_hidden_labels_leaves_its_place_to_the_next_split(
    tmp_path: Path, loader: Loader, hidden: object
) -> None:
    first, second = (type(hidden)(label) for label in (0, 1))
    data = loader(tmp_path / "data", train=[first, second] * 3, test=[hidden] * 3, dev=[second, first])
    assert texts(data.test) == ["dev 0", "dev 1"]
    assert (data.classes, data.test.labels.tolist()) == (["0", "1"], [1, 0])
    assert data.notes == ["test: its samples have no labels, so it is not used"]


@LOADERS
def test_a_test_set_is_drawn_where_every_other_has_hidden_labels(tmp_path: Path, loader: Loader) -> None:
    data = loader(tmp_path / "data", train=[0, 1] * 5, test=[-1, -1], validation=[-1])
    assert {text.split()[0] for text in texts(data)} == {"train"}
    assert sorted(data.test.labels) == [0, 1]
    assert [note.split(":")[0] for note in data.notes] == ["test", "validation"]


@LOADERS
def test_a_class_may_be_called_minus_one(tmp_path: Path, loader: Loader) -> None:
    data = loader(tmp_path / "data", train=[-1, 1] * 3, test=[-1, -1, 1], dev=[1, -1])
    assert texts(data.test) == ["test 0", "test 1", "test 2"]
    assert data.classes == ["-1", "1"]
    data = loader(tmp_path / "sorted", train=[-1, 1] * 3, test=[-1, -1], dev=[1, -1])
    assert texts(data.test) == ["test 0", "test 1"]


def test_numbers_are_compared_as_numbers(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text,label\na,0\nb,1\nc,01\nd,10\ne,2\nf,1.5\n")
    (tmp_path / "test.csv").write_text("text,label\ng,0.0\nh,1.0\ni,+1\nj,010\nk,2.\nl,1.50\n")
    data = load(tmp_path)
    assert data.classes == ["0", "1", "1.5", "2", "10"]
    assert data.train.labels.tolist() == [0, 1, 1, 4, 3, 2]
    assert data.test.labels.tolist() == [0, 1, 1, 4, 3, 2]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_column_of_floats_has_the_classes_of_one_of_whole_numbers(tmp_path: Path, suffix: str) -> None:
    write(tmp_path / f"train.{suffix}", rows([0, 1, 2], "train"))
    write(tmp_path / f"test.{suffix}", rows([2.0, 1.0, 0.0], "test"))
    data = load(tmp_path)
    assert (data.classes, data.test.labels.tolist()) == (["0", "1", "2"], [2, 1, 0])


@LOADERS
def test_classes_of_the_test_set_alone_are_shown_beside_those_of_the_training_set(
    tmp_path: Path, loader: Loader
) -> None:
    with pytest.raises(
        InputError,
        match=r"^data\.root: found the classes 'Neg', 'Pos' in the test set alone \(first in .*test.*\), expected "
        r"those of the training set: 'neg', 'pos'$",
    ):
        loader(tmp_path / "spelling", train=["neg", "pos"] * 2, test=["neg", "Neg", "Pos"])
    with pytest.raises(InputError, match=r"found the classes '-1' in the test set alone"):
        loader(tmp_path / "some", train=[0, 1] * 2, test=[0, -1, 1])


def test_names_that_a_data_set_brings_may_have_no_sample(tmp_path: Path) -> None:
    features = Features(text=Value("string"), label=ClassLabel(names=["x", "y", "z"]))
    train, test = (
        Dataset.from_dict({"text": ["a", "b"], "label": labels}, features=features) for labels in ([0, 1], [1, 2])
    )
    DatasetDict(train=train, test=train).save_to_disk(tmp_path / "same")
    assert load(tmp_path / "same").classes == ["x", "y", "z"]
    DatasetDict(train=train, test=test).save_to_disk(tmp_path / "other")
    with pytest.raises(InputError, match=r"found the classes 'z' in the test set alone \(first in test, row 1\)"):
        load(tmp_path / "other")


def test_a_folder_of_images_in_the_test_set_alone_is_named(make_tree: MakeTree) -> None:
    root = make_tree({"train/photo": ["cat", "dog"], "test/photo": ["cat", "Dog"]})
    with pytest.raises(InputError, match=r"found the classes 'Dog' in the test set alone, .*: 'cat', 'dog'$"):
        load_source(DataConfig("image_folder", str(root)), seed=0)


def test_a_label_in_the_test_lists_alone_is_named(tmp_path: Path) -> None:
    for split, labels in {"train": [0, 1], "test": [1, 2]}.items():
        (tmp_path / "splits").mkdir(exist_ok=True)
        lines = [f"real/class_{label}/a.jpg {label}\n" for label in labels]
        (tmp_path / "splits" / f"real_{split}.txt").write_text("".join(lines))
    with pytest.raises(InputError, match=r"found the classes 'class_2' in the test set alone \(first in .*, line 2\)"):
        load_source(DataConfig("domainnet", str(tmp_path)), seed=0)


def test_folders_that_are_numbers_are_classes_in_their_order(make_tree: MakeTree) -> None:
    root = make_tree({"photo": ["10", "9", "2"]}, count=2)
    assert load_source(DataConfig("image_folder", str(root)), seed=0).classes == ["2", "9", "10"]


@pytest.mark.parametrize("other", ["Dog_house", "dog house", "DOG-HOUSE"])
def test_one_class_that_domains_spell_differently_is_named(make_tree: MakeTree, other: str) -> None:
    root = make_tree({"art": ["cat", "dog_house"], "photo": ["cat", other]})
    with pytest.raises(
        InputError,
        match=r"^data\.root: found the classes '.*', '.*' in different domains \(.*\), expected one spelling",
    ):
        load_source(DataConfig("image_folder", str(root)), seed=0)


def test_classes_that_are_spelt_alike_in_one_domain_are_reported(tmp_path: Path) -> None:
    labels = ["a", "A", "b", "B"]
    file = write(tmp_path / "letters.csv", rows(labels * 2, "letter"))
    data = load(file)
    assert data.classes == ["A", "B", "a", "b"]
    assert data.notes == [
        f"classes: '{letter.upper()}', '{letter}' are different ones, though they are spelt alike" for letter in "ab"
    ]


def test_labels_of_learnt_texts_may_differ_in_the_test_set(tmp_path: Path) -> None:
    for split, label in {"train": "x", "test": "-1"}.items():
        write(tmp_path / f"{split}.jsonl", rows([label] * 3, split))
    assert load(tmp_path, "causal_lm").classes == ["-1", "x"]


def test_the_test_set_is_what_is_named_if_only_it_has_no_labels_column(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", rows([0, 1] * 3, "train"))
    (tmp_path / "test.csv").write_text("text\na\nb\n")
    with pytest.raises(InputError, match=r"data\.columns\.label: .*test\.csv, line 2: found no column 'label'"):
        load(tmp_path)
    write(tmp_path / "validation.csv", rows([1, 0], "validation"))
    assert texts(load(tmp_path).test) == ["validation 0", "validation 1"]
