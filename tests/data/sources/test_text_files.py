"""Texts from files of every kind, with what can be wrong in them."""

import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets import Dataset

from fedra_engine.config import ColumnsConfig
from fedra_engine.runtime.errors import InputError
from tests.data.text_files import ROWS, load, texts, write


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_any_kind_of_file_gives_the_same_samples(tmp_path: Path, suffix: str, end: str) -> None:
    data = load(write(tmp_path / f"reviews.{suffix}", end=end))
    expected = [row["text"] for row in ROWS]
    assert texts(data) == [text.replace("\t", " ") if suffix == "tsv" else text for text in expected]
    assert [data.classes[label] for label in data.labels] == [row["label"] for row in ROWS]
    assert [data.domains[domain] for domain in data.domain_of] == [row["domain"] for row in ROWS]
    assert np.bincount(data.test.domain_of * 2 + data.test.labels).tolist() == [1, 1, 1, 1]


def test_a_byte_order_mark_and_quoted_line_breaks_are_read_as_they_are_meant(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(b'\xef\xbb\xbftext,label\r\n"two\r\nlines, one text",x\r\nb,y\r\nc,x\r\nd,y\r\n')
    data = load(file)
    assert texts(data)[0] == "two\r\nlines, one text"
    assert data.sample_sources.tolist() == [(f"{file}, line", number) for number in (2, 4, 5, 6)]
    assert data.domains == ["all"]


def test_blank_lines_are_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("\n\ntext,label\na,x\n\nb,x\nc,y\nd,y\n")
    data = load(file)
    assert texts(data) == list("abcd")
    assert data.sample_sources["number"].tolist() == [4, 6, 7, 8]
    file.write_text("\ntext,label\na\n")
    with pytest.raises(InputError, match=r"a\.csv, line 3: found 1 values, expected 2 as in line 2"):
        load(file)


def test_numbers_are_classes_in_their_order_and_columns_can_be_named(tmp_path: Path) -> None:
    rows = [{"body": "a b", "stars": stars, "by": f"user {stars}"} for stars in (10, 9, 2) for _ in range(2)]
    columns = ColumnsConfig(input="body", label="stars", client="by")
    data = load(write(tmp_path / "a.jsonl", rows), columns=columns)
    assert data.classes == ["2", "9", "10"]
    assert data.labels.tolist() == [2, 2, 1, 1, 0, 0]
    assert data.clients.tolist() == [row["by"] for row in rows]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"text,label\na,x\nb\n", r"a\.csv, line 3: found 1 values, expected 2 as in line 1"),
        (
            "a.csv",
            b"text,label\na,x\n,y\n",
            r"a\.csv, line 3: found no text in column 'text', expected some, or data\.unreadable skip",
        ),
        ("a.csv", b"text,label\na,x\nb,\n", r"a\.csv, line 3: found no label in column 'label', expected"),
        ("a.csv", b'text,label\n"a"b,x\n', r"a\.csv, line 2: .*expected separated values"),
        ("a.csv", b"body,label\nb,x\n", r"a\.csv, line 2: found no column 'text', expected one of 'body', 'label'"),
        ("a.csv", b"text,stars\nb,x\n", r"a\.csv, line 2: found no column 'label'"),
        ("a.csv", b"text,label\n", r"found no samples in"),
        ("a.csv", b"text,label,text\na,b,c\n", r"a\.csv, line 1: found several columns 'text', expected one"),
        ("a.jsonl", b'{"text": ["a"], "label": 1}\n', r"a\.jsonl, line 1: found a list in column 'text'"),
        ("a.jsonl", b'{"text": {"a": 1}, "label": 1}\n', r"a\.jsonl, line 1: found a dict in column 'text'"),
        ("a.jsonl", b'{"text": true, "label": 1}\n', r"a\.jsonl, line 1: found a bool in column 'text'"),
        (
            "a.jsonl",
            b'{"text": "a", "label": 1, "domain": {}}\n',
            r"a\.jsonl, line 1: found {} in column 'domain', expected a name",
        ),
        (
            "a.jsonl",
            b'{"text": "a", "label": 1, "client": []}\n',
            r"a\.jsonl, line 1: found \[\] in column 'client', expected a name",
        ),
        ("a.jsonl", b'{"text": "a", "label": 1}\n{"text": "b"\n', r"a\.jsonl, line 2: .*expected a JSON object"),
        ("a.jsonl", b'{"text": "\\ud800", "label": 1}\n', r"a\.jsonl, line 1: .*surrogates"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl, line 1: .*expected a JSON object"),
        ("a.jsonl", b"{}\n", r"a\.jsonl, line 1: found no column 'text'"),
        (
            "a.jsonl",
            b'{"text": "a", "label": 1, "domain": "x"}\n{"text": "b", "label": 1}\n',
            r"a\.jsonl, line 2: found no domain, .*expected one in every line or in none",
        ),
        (
            "a.jsonl",
            b'{"text": "a", "label": 1}\n{"text": "b", "label": 1, "domain": "x"}\n',
            r"a\.jsonl, line 2: found a domain, .*expected one in every line or in none",
        ),
        ("a.jsonl", b"3\n", r"a\.jsonl, line 1: found '3', expected a JSON object"),
        (
            "a.jsonl",
            b'{"text": "a", "label": 1.5}\n',
            r"a\.jsonl, line 1: found 1\.5 in column 'label', expected a name",
        ),
        ("a.jsonl", b'{"text": "a", "label": 1}\n{"text": "a", "label": null}\n', r"a\.jsonl, line 2: found no label"),
        ("a.parquet", b"PAR1", r"a\.parquet.*expected a parquet file"),
        ("a.doc", b"", r"a\.doc', expected a file that ends in one of \.csv \.tsv \.jsonl \.txt \.parquet"),
    ],
)
def test_lines_that_cannot_be_used_are_reported(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"^data\.(root|columns\.\w+): .*{message}"):
        load(tmp_path / name)


@pytest.mark.parametrize(
    ("column", "wrong"),
    [
        ("text", pa.array([b"a", b"b", b"caf\xe9"]).view(pa.string())),
        ("when", pa.array([0, 1, 2**62], pa.timestamp("us"))),
    ],
    ids=["no UTF-8", "no date"],
)
def test_values_of_a_parquet_file_that_are_none_are_reported(tmp_path: Path, column: str, wrong: pa.Array) -> None:
    columns = {"text": ["a", "b", "c"], "label": [0, 1, 0]} | {column: wrong}
    pyarrow.parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"^data\.root: .*a\.parquet, row 3: .*; expected UTF-8 texts and dates"):
        load(tmp_path / "a.parquet")


def test_blanks_around_names_do_not_make_other_names(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label,domain,client\na,0,x,u\nb, 0 , x,u \nc,1,x ,v\nd, 1,x, v\n")
    data = load(tmp_path / "a.csv")
    assert (data.classes, data.labels.tolist(), data.domains) == (["0", "1"], [0, 0, 1, 1], ["x"])
    assert data.clients.tolist() == ["u", "u", "v", "v"]


MISSING = [pa.array([None, "b"]), pa.array(["", "b"]), pa.array([" \n", "b"]), pa.array([math.nan, 1.5])]


def write_columns(file: Path, **columns: pa.Array) -> Path:
    """A parquet or jsonl file with 4 rows, which repeat two."""
    table = pa.table({name: pa.concat_arrays([values] * 2) for name, values in columns.items()})
    if file.suffix == ".parquet":
        pyarrow.parquet.write_table(table, file)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    return file


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("values", MISSING, ids=["null", "empty", "blank", "nan"])
def test_cells_without_a_text_are_named_or_skipped(tmp_path: Path, suffix: str, values: pa.Array) -> None:
    file = write_columns(tmp_path / f"a.{suffix}", text=values, label=pa.array([0, 1]))
    with pytest.raises(InputError, match=rf"^data\.root: .*a\.{suffix}, \w+ 1: found no text in column 'text', expec"):
        load(file)
    data = load(file, "causal_lm", unreadable="skip")
    assert list(data.content["response"]) == [str(values[1])] * 2
    assert len([note for note in data.notes if note.endswith("skipped, it has no text")]) == 2


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("values", MISSING, ids=["null", "empty", "blank", "nan"])
def test_cells_without_a_text_leave_a_gap_in_prompts(tmp_path: Path, suffix: str, values: pa.Array) -> None:
    file = write_columns(tmp_path / f"a.{suffix}", context=values, response=pa.array(["x", "y"]))
    data = load(file, "causal_lm", prompt="({context})")
    assert list(data.content["prompt"]) == ["()", f"({values[1]})"] * 2


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("role", ["label", "domain"])
@pytest.mark.parametrize("values", [*MISSING[:3], pa.array([math.nan, 1.0])], ids=["null", "empty", "blank", "nan"])
def test_cells_without_a_name_are_named(tmp_path: Path, suffix: str, role: str, values: pa.Array) -> None:
    columns = {"text": pa.array(["a", "b"]), "label": pa.array([0, 1])} | {role: values}
    file = write_columns(tmp_path / f"a.{suffix}", **columns)
    with pytest.raises(InputError, match=rf"^data\.columns\.{role}: .*, \w+ 1: found no {role} in column '{role}', ex"):
        load(file)


@pytest.mark.parametrize("values", [*MISSING[:3], pa.array([math.nan, 7.0])], ids=["null", "empty", "blank", "nan"])
def test_cells_without_a_client_belong_to_none(tmp_path: Path, values: pa.Array) -> None:
    columns = {"text": pa.array(["a", "b"]), "label": pa.array([0, 1]), "client": values}
    data = load(write_columns(tmp_path / "a.parquet", **columns))
    assert data.clients.tolist() == ["", "7" if values[1].as_py() == 7 else "b"] * 2


@pytest.mark.parametrize("word", ["NA", "null", "nan", "None", "N/A"])
def test_words_that_others_take_for_missing_are_texts_and_names(tmp_path: Path, word: str) -> None:
    (tmp_path / "a.csv").write_text(f"text,label\n{word},{word}\n{word},{word}\nb,x\nc,x\n")
    data = load(tmp_path / "a.csv")
    assert texts(data)[:2] == [word, word]
    assert set(data.classes) == {word, "x"}


def test_numbers_are_texts_and_infinity_is_none(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": 7}\n{"text": 1.5}\n')
    assert list(load(file, "causal_lm").content["response"]) == ["7", "1.5"]
    file.write_text('{"text": 7}\n{"text": -Infinity}\n')
    with pytest.raises(InputError, match=r"a\.jsonl, line 2: found -inf in column 'text', expected a text"):
        load(file, "causal_lm")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "text,label\n{0},x\n{0},x\n"),
        ("a.tsv", "text\tlabel\n{0}\tx\n{0}\tx\n"),
        ("a.jsonl", '{{"text": "{0}"}}\n{{"text": "{0}"}}\n'),
        ("a.txt", "{0}\n{0}\n"),
    ],
)
@pytest.mark.parametrize(
    ("encoding", "word"), [("cp1252", "größer"), ("utf-16", "größer"), ("utf-16-be", "größer"), ("shift_jis", "日本ソ")]
)
def test_texts_in_other_encodings_are_read(tmp_path: Path, name: str, content: str, encoding: str, word: str) -> None:
    (tmp_path / name).write_text(content.format(word), encoding=encoding)
    assert list(load(tmp_path / name, "causal_lm", encoding=encoding).content["response"]) == [word] * 2


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_goes_before_the_encoding(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.csv").write_text("text,label\ngrößer,x\nb,x\nc,y\nd,y\n", encoding=encoding)
    for other in ("utf-8", "cp1252"):
        assert texts(load(tmp_path / "a.csv", encoding=other))[0] == "größer"


@pytest.mark.parametrize("layout", ["{}.csv", "train/{}.csv"])
def test_all_files_in_another_encoding_are_named_at_once(tmp_path: Path, layout: str) -> None:
    for name, text in {"a": "x", **dict.fromkeys("bcdef", "größer")}.items():
        file = tmp_path / layout.format(name)
        file.parent.mkdir(exist_ok=True)
        file.write_text("text,label\nu,0\n" * 3 + f"{text},1\n", encoding="cp1252")
    if "/" in layout:
        (tmp_path / "test").mkdir()
        (tmp_path / "test" / "a.csv").write_bytes(b"\xe9")
    others = r" and 3 others" if "/" in layout else r" and 2 others"
    with pytest.raises(
        InputError,
        match=r"^data\.encoding: found no utf-8 text in .*b\.csv \(line 7\), .*c\.csv \(line 7\), .*d\.csv \(line 7\)"
        + others,
    ):
        load(tmp_path)


@pytest.mark.parametrize("encoding", ["latin-2000", "rot13", "base64", "", "a\0b", "undefined"])
def test_unknown_encodings_are_reported(tmp_path: Path, encoding: str) -> None:
    with pytest.raises(InputError, match=r"^data\.encoding: found '.*', expected the name of an encoding, such as cp1"):
        load(write(tmp_path / "a.csv"), encoding=encoding)


def test_an_encoding_without_text_files_is_reported(tmp_path: Path) -> None:
    message = r"^data\.encoding: found cp1252 for data without \.csv, \.tsv, \.jsonl, \.txt files, expected utf-8"
    with pytest.raises(InputError, match=message):
        load(write(tmp_path / "a.parquet"), encoding="cp1252")
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    for source in ("text_classification", "causal_lm", "hf_dataset"):
        with pytest.raises(InputError, match=message):
            load(tmp_path / "saved", source, encoding="cp1252")


def test_a_nul_character_is_a_sign_of_another_encoding(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\na,x\n", encoding="utf-16-le")
    with pytest.raises(InputError, match=r"^data\.root: .*a\.csv, line 1: found a NUL character, expected utf-8 text"):
        load(tmp_path / "a.csv")
