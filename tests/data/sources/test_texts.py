"""Loaded texts: saved data sets, repeated and empty texts, and where they are kept."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value

from fedra_engine.config import ColumnsConfig
from fedra_engine.data.cache import cache_folder
from fedra_engine.data.tokenization import token_rows, tokenization_for
from fedra_engine.runtime.errors import InputError
from tests.data.text_files import ROWS, load, texts, write
from tests.data.tokenizers import save_encoder_tokenizer


def test_texts_without_content_are_skipped_on_demand(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [*ROWS[:10], {"text": " ", "label": "bad", "domain": "books"}])
    data = load(file, unreadable="skip")
    assert len(data) == 10
    assert data.notes[0] == f"{file}, line 11: skipped, it has no text"


def test_repeated_texts_are_reported(tmp_path: Path) -> None:
    rows = [{"text": f"text {number}", "label": number % 2} for number in range(8)]
    assert load(write(tmp_path / "once.csv", rows)).notes == []
    (note,) = load(write(tmp_path / "twice.csv", rows + rows[:3])).notes
    assert note.startswith("texts: 3 repeat another, so the test set that is drawn")
    write(tmp_path / "split" / "train.csv", rows[:6] + rows[:2])
    write(tmp_path / "split" / "test.csv", rows[4:])
    assert load(tmp_path / "split").notes == ["texts: 2 of the test set are in the training set, too"]


def test_texts_are_read_from_a_file_that_leaves_nothing_behind(tmp_path: Path) -> None:
    rows = [{"text": f"text {number}", "label": number % 2} for number in range(2500)]
    data = load(write(tmp_path / "a.jsonl", rows))
    assert texts(data) == [row["text"] for row in rows]
    assert list(cache_folder().iterdir()) == []


def test_a_cache_folder_that_cannot_be_written_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "file")
    with pytest.raises(InputError, match=r"data: cannot write into .*HF_DATASETS_CACHE names it"):
        load(write(tmp_path / "a.csv"))


def test_samples_of_a_domain_stand_together_and_are_cached_together(tmp_path: Path) -> None:
    rows = [{"text": f"a {i}", "label": i // 2 % 2, "domain": ["films", "books"][i % 2]} for i in range(40)]
    data = load(write(tmp_path / "a.jsonl", rows))
    assert data.domain_of.tolist() == [0] * 20 + [1] * 20
    assert texts(data) == [f"a {i}" for i in [*range(1, 40, 2), *range(0, 40, 2)]]
    assert data.describe(0, "text") == f"{tmp_path / 'a.jsonl'}, line 2"
    path = save_encoder_tokenizer(tmp_path / "model")
    token_rows(data, tokenization_for(path, SimpleNamespace(model_type="bert")), skip=False)
    assert len(list(cache_folder().glob("*.arrow"))) == 2


def test_saved_datasets_are_read_too(tmp_path: Path) -> None:
    DatasetDict(train=Dataset.from_list(ROWS[:15]), test=Dataset.from_list(ROWS[5:])).save_to_disk(tmp_path / "saved")
    data = load(tmp_path / "saved")
    assert (len(data.train), len(data.test)) == (15, 15)
    assert data.classes == ["bad", "good"]


def test_the_classes_of_a_saved_dataset_keep_their_names_and_order(tmp_path: Path) -> None:
    features = Features(text=Value("string"), label=ClassLabel(names=["negative", "good", "bad"]))
    rows = {"text": [f"text {number}" for number in range(8)], "label": [0, 1, 2, 2] * 2}
    Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
    data = load(tmp_path / "saved")
    assert data.classes == ["negative", "good", "bad"]
    assert data.labels.tolist() == rows["label"]


def test_images_are_no_texts_to_classify(tmp_path: Path) -> None:
    image = np.zeros((4, 4), dtype=np.uint8)
    rows = {"image": [image] * 4, "label": [0, 0, 1, 1]}
    Dataset.from_dict(rows, features=Features(image=Image(), label=Value("int64"))).save_to_disk(tmp_path / "saved")
    with pytest.raises(InputError, match=r"data\.columns\.input: found images with data\.source text_classification"):
        load(tmp_path / "saved", columns=ColumnsConfig(input="image"))
