"""The server's own samples: any images in a folder, or the texts in a file."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from fedra_engine.config import ColumnsConfig, DataConfig
from fedra_engine.data.server_data import load_unlabelled
from fedra_engine.runtime.errors import InputError

TABLES = {
    "a.csv": 'text,label\n"one, two",x\nthree,y\n',
    "a.jsonl": '{"text": "one, two"}\n{"text": null}\n{"text": "three"}\n',
    "a.txt": "one, two\n\nthree\n",
}


@pytest.mark.parametrize("name", TABLES)
def test_all_texts_of_a_file_are_samples_without_labels(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(TABLES[name])
    texts = load_unlabelled(tmp_path / name, ["a"], "text_classification", DataConfig())
    assert list(texts.content["text"]) == ["one, two", "three"]
    assert not texts.is_test.any()
    causal = load_unlabelled(tmp_path / name, ["a"], "causal_lm", DataConfig())
    assert list(causal.content["response"]) == ["one, two", "three"]
    assert list(causal.content["prompt"]) == ["", ""]


def test_the_column_is_that_of_the_data_but_for_plain_text(tmp_path: Path) -> None:
    config = DataConfig(columns=ColumnsConfig(input="sentence"))
    for name, content in (("a.csv", "sentence\none\n"), ("a.txt", "one\n")):
        (tmp_path / name).write_text(content)
        found = load_unlabelled(tmp_path / name, ["a"], "text_classification", config)
        assert list(found.content["text"]) == ["one"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{}", r"method.stand_in_data: found .*a\.json', expected a file that ends in"),
        ("a.jsonl", "{", r"method.stand_in_data: .*a\.jsonl, line 1: "),
        ("a.csv", "words\none\n", r"method.stand_in_data: found no texts in column 'text' of .*a\.csv, expected some"),
        ("b.csv", None, r"method.stand_in_data: found no file .*, expected one of the domains p, q, or a file of"),
    ],
)
def test_files_that_cannot_be_used_are_named(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        load_unlabelled(tmp_path / name, ["p", "q"], "text_classification", DataConfig())


def test_hidden_files_and_folders_are_left_out(tmp_path: Path) -> None:
    for place in ("b/1.png", "a.png", ".hidden/2.png", "b/._3.png"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        Image.new("L", (2, 2)).save(tmp_path / place)
    found = load_unlabelled(tmp_path, ["p"], "image_classification", DataConfig())
    paths = [Path(image["path"]) for image in found.content.data["image"].to_pylist()]
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == ["a.png", "b/1.png"]
