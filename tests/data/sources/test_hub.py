"""Data sets of the `datasets` library: images or texts, with the columns they happen to have."""

import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value

from fedra_engine.config import ColumnsConfig, DataConfig
from fedra_engine.data import images as images_module
from fedra_engine.data.domain_data import DomainData
from fedra_engine.data.preprocessing import Preprocessing
from fedra_engine.data.samples import prepare
from fedra_engine.data.sources import load_source
from fedra_engine.runtime.errors import InputError
from tests.data.preprocessed import preprocess
from tests.data.tokenizers import save_encoder_tokenizer

GREY = Preprocessing(4, 1, (0.5,), (0.5,))


def images(count: int = 12, seed: int = 0) -> Dataset:
    rng = np.random.default_rng(seed)
    features = Features(image=Image(), label=ClassLabel(names=["cat", "dog"]), domain=Value("string"))
    columns = {
        "image": list(rng.integers(256, size=(count, 4, 4), dtype=np.uint8)),
        "label": [index % 2 for index in range(count)],
        "domain": ["photo" if index < count // 2 else "art" for index in range(count)],
    }
    return Dataset.from_dict(columns, features=features)


def load(data: Dataset | DatasetDict, folder: Path, **settings: object) -> DomainData:
    data.save_to_disk(folder / "saved")
    return load_source(DataConfig("hf_dataset", str(folder / "saved"), **settings), seed=0)


def test_images_with_their_labels_and_domains(tmp_path: Path) -> None:
    data = load(images(), tmp_path)
    assert (data.task, data.classes, data.domains) == ("image_classification", ["cat", "dog"], ["art", "photo"])
    # The first were photos; now the samples of a domain stand together.
    assert data.domain_of.tolist() == [0] * 6 + [1] * 6
    expected = images().select([*range(6, 12), *range(6)])
    assert [image.tobytes() for image in data.content["image"]] == [image.tobytes() for image in expected["image"]]
    assert [data.describe(sample, "sample") for sample in (0, 6)] == ["train, row 6", "train, row 0"]
    assert np.bincount(data.test.domain_of * 2 + data.test.labels).tolist() == [1, 1, 1, 1]
    chosen = load(images(), tmp_path / "chosen", domains=["photo"])
    assert set(chosen.domain_of) == {0}


def test_a_test_split_is_kept_and_validation_stands_in(tmp_path: Path) -> None:
    for name in ("test", "validation"):
        data = load(DatasetDict(train=images(12), **{name: images(4, seed=1)}), tmp_path / name)
        assert (len(data.train), len(data.test)) == (12, 4)


def test_a_test_split_with_hidden_labels_is_none(tmp_path: Path) -> None:
    def texts(*labels: int) -> Dataset:
        features = Features(text=Value("string"), label=ClassLabel(names=["x", "y"]))
        return Dataset.from_dict({"text": ["a", "b"], "label": labels}, features=features)

    data = load(DatasetDict(train=texts(0, 1), validation=texts(1, 0), test=texts(-1, -1)), tmp_path)
    assert data.labels.tolist() == [0, 1, 1, 0]
    assert data.notes == ["test: its samples have no labels, so it is not used"]
    assert data.is_test.tolist() == [False, False, True, True]


def test_stored_images_are_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = load(images(), tmp_path)
    first = preprocess(data, GREY)
    expected = np.stack([np.asarray(image) for image in data.content["image"]])
    rows = torch.arange(len(first))
    np.testing.assert_array_equal(first.pixels.gather(rows, torch.device("cpu"))[:, 0], expected)
    monkeypatch.setattr(images_module.PillowImage, "open", lambda *_, **__: pytest.fail("decoded again"))
    for others in ({}, {"domains": ["photo"]}, {"columns": ColumnsConfig(label="domain")}):
        preprocess(load_source(DataConfig("hf_dataset", str(tmp_path / "saved"), **others), seed=0), GREY)


def test_other_images_are_not_taken_for_those_in_the_cache(tmp_path: Path) -> None:
    """Neither those of another data set, nor others of the same one in the same place."""
    for seed in range(2):
        data = load(images(seed=seed), tmp_path / str(seed))
        for some in (data, data.select(np.arange(len(data))[::-1])):
            expected = np.stack([np.asarray(image) for image in some.content["image"]])
            found = preprocess(some, GREY).pixels.gather(torch.arange(len(some)), torch.device("cpu"))[:, 0]
            np.testing.assert_array_equal(found, expected)


def test_images_of_a_data_set_that_was_made_anew_under_its_fingerprint_are_decoded_again(tmp_path: Path) -> None:
    """As of a generator, whose fingerprint does not depend on the files that it reads."""
    for seed in range(2):
        made = images(seed=seed)
        made._fingerprint = "the same"
        data = load(made, tmp_path)
        expected = np.stack([np.asarray(image) for image in data.content["image"]])
        found = preprocess(data, GREY).pixels.gather(torch.arange(len(data)), torch.device("cpu"))[:, 0]
        np.testing.assert_array_equal(found, expected)


def test_texts_are_taken_too_and_columns_can_be_named(tmp_path: Path) -> None:
    rows = [{"sentence": f"text {index}", "mood": index % 2, "writer": f"w{index % 3}"} for index in range(12)]
    columns = ColumnsConfig(input="sentence", label="mood", client="writer")
    data = load(Dataset.from_list(rows), tmp_path, columns=columns)
    assert (data.task, data.classes, data.domains) == ("text_classification", ["0", "1"], ["all"])
    assert data.clients.tolist() == [row["writer"] for row in rows]


def test_clients_are_names_without_the_blanks_around_them(tmp_path: Path) -> None:
    rows = [
        {"text": f"text {index}", "label": index % 2, "client": name} for index, name in enumerate(["a ", " a"] * 4)
    ]
    assert set(load(Dataset.from_list(rows), tmp_path / "names").clients) == {"a"}
    rows = [row | {"client": 1.5} for row in rows]
    with pytest.raises(
        InputError, match=r"^data\.columns\.client: train, row 0: found 1\.5 in column 'client', expected"
    ):
        load(Dataset.from_list(rows), tmp_path / "numbers")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            ColumnsConfig(input="photo"),
            r"data\.columns\.input: found no column 'photo', expected one of 'image', 'label'",
        ),
        (ColumnsConfig(label="class"), r"data\.columns\.label: found no column 'class'"),
        (ColumnsConfig(domain="style"), r"data\.columns\.domain: found no column 'style'"),
        (ColumnsConfig(client="owner"), r"data\.columns\.client: found no column 'owner'"),
        (ColumnsConfig(input="label"), r"data\.columns\.input: found .* in column 'label', expected images or texts"),
    ],
)
def test_columns_that_are_not_there_are_reported(tmp_path: Path, columns: ColumnsConfig, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(images(), tmp_path, columns=columns)


def test_labels_outside_their_names_are_reported(tmp_path: Path) -> None:
    unlabelled = images().cast_column("label", Value("int64")).to_dict()["label"]
    unlabelled[3] = -1
    features = Features(text=Value("string"), label=ClassLabel(names=["cat", "dog"]))
    data = Dataset.from_dict({"text": ["a"] * 12, "label": unlabelled}, features=features)
    with pytest.raises(InputError, match=r"data\.columns\.label: train, row 3: found -1 in column 'label'"):
        load(data, tmp_path)


def png() -> bytes:
    target = io.BytesIO()
    images(1)["image"][0].save(target, "PNG")
    return target.getvalue()


def encoded(contents: list[bytes | None]) -> Dataset:
    """Rows of encoded images; None where there is no image at all."""
    features = Features(image=Image(), label=ClassLabel(names=["cat", "dog"]))
    rows = [None if content is None else {"bytes": content, "path": None} for content in contents]
    return Dataset.from_dict({"image": rows, "label": [i % 2 for i in range(len(rows))]}, features=features)


@pytest.mark.parametrize(
    ("content", "reason"), [(None, "there is no image"), (b"", "cannot identify"), (b"hello", "cannot identify")]
)
@pytest.mark.parametrize("place", [0, 5])
def test_rows_without_an_image_are_named_or_skipped(
    tmp_path: Path, content: bytes | None, reason: str, place: int
) -> None:
    contents = [png() for _ in range(8)]
    contents[place] = content
    data = load(encoded(contents), tmp_path)
    with pytest.raises(InputError, match=rf"data\.root: cannot read train, row {place}: {reason}"):
        preprocess(data, GREY)
    config = DataConfig("hf_dataset", str(tmp_path / "saved"), image_size=4, unreadable="skip")
    prepared = prepare(data, config, str(tmp_path), type("Config", (), {"num_channels": 1}))
    assert len(prepared.data) == 7
    assert prepared.data.notes[0].startswith(f"train, row {place}: skipped, {reason}")


def test_a_broken_image_at_the_head_of_the_test_split_is_like_any_other(tmp_path: Path) -> None:
    data = load(DatasetDict(train=encoded([png()] * 4), test=encoded([b"hello", *[png()] * 3])), tmp_path)
    with pytest.raises(InputError, match=r"data\.root: cannot read test, row 0: cannot identify"):
        preprocess(data, GREY)


@pytest.mark.parametrize("text", [None, "", " \n"])
def test_rows_without_a_text_are_named_or_skipped(tmp_path: Path, text: str | None) -> None:
    rows = [{"text": "a b", "label": index % 2} for index in range(7)]
    data = load(Dataset.from_list([*rows, {"text": text, "label": 1}]), tmp_path)
    path, shape = save_encoder_tokenizer(tmp_path / "model"), SimpleNamespace(model_type="bert")
    with pytest.raises(InputError, match=r"data\.root: cannot read train, row 7: found no text; expected a text"):
        prepare(data, DataConfig(), path, shape)
    prepared = prepare(data, DataConfig(unreadable="skip"), path, shape)
    assert len(prepared.data) == 7
    assert prepared.data.notes == ["train, row 7: skipped, found no text"]


@pytest.mark.parametrize("source", ["text_classification", "causal_lm"])
def test_texts_of_the_hub_are_of_the_subset_that_is_asked_for(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Dataset.from_dict({"text": [f"text {row}" for row in range(20)], "label": [0, 1] * 10})
    asked = []

    def load_dataset(*names: str | None) -> DatasetDict:
        asked.append(names)
        return DatasetDict(train=whole)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    load_source(DataConfig(source, "some/corpus", subset="en"), seed=0)
    assert asked == [("some/corpus", "en")]


def test_an_empty_test_split_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = images()
    monkeypatch.setattr("datasets.load_dataset", lambda *_: DatasetDict(train=whole, test=whole.select([])))
    data = load_source(DataConfig("hf_dataset", "some/data"), seed=0)
    assert data.is_test.sum() == 4


def test_a_test_split_of_other_columns_is_reported(tmp_path: Path) -> None:
    train, other = Dataset.from_dict({"text": ["a"] * 4, "label": [0, 1] * 2}), ClassLabel(names=["x", "y"])
    test = train.cast_column("label", other)
    with pytest.raises(InputError, match=r"data\.root: column 'label' of the test split: found ClassLabel"):
        load(DatasetDict(train=train, test=test), tmp_path / "type")
    missing = r"data\.root: column 'label' of the test split: found no such column"
    with pytest.raises(InputError, match=missing):
        load(DatasetDict(train=train, test=train.remove_columns("label")), tmp_path / "missing")
    # A column that is not used may be anything.
    ids = DatasetDict(train=train.add_column("id", [1] * 4), test=train.add_column("id", ["a"] * 4))
    assert len(load(ids, tmp_path / "unused").test) == 4


@pytest.mark.parametrize("role", ["domain", "client"])
def test_a_role_that_only_the_test_split_names_is_not_used(role: str, tmp_path: Path) -> None:
    train = Dataset.from_dict({"text": ["a", "b", "c", "d"], "label": [0, 1] * 2})
    data = load(DatasetDict(train=train, test=train.add_column(role, ["x"] * 4)), tmp_path / "data")
    assert (data.domains, data.clients, int(data.is_test.sum())) == (["all"], None, 4)


def test_what_cannot_be_loaded_is_reported(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.root: cannot load 'no/such-data': .*expected a folder that save_to"):
        load_source(DataConfig("hf_dataset", "no/such-data"), seed=0)
    with pytest.raises(
        InputError, match=r"data\.root: found the splits 'a', 'b' in '.*saved', expected one named train"
    ):
        load(DatasetDict(a=images(), b=images()), tmp_path)


def test_files_that_the_library_cannot_read_are_reported(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a", "label": 0}\n{"text"')
    with pytest.raises(InputError, match=r"data\.root: cannot load '.*': .*expected a folder that save_to"):
        load_source(DataConfig("hf_dataset", str(tmp_path)), seed=0)
