"""Texts from files of every kind, with what can be wrong in them."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from fedra_engine.config import ColumnsConfig
from fedra_engine.errors import InputError
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
    assert list(map(str, data.origins)) == [f"{file}, line {number}" for number in (2, 4, 5, 6)]
    assert data.domains == ["all"]


def test_blank_lines_are_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("\n\ntext,label\na,x\n\nb,x\nc,y\nd,y\n")
    data = load(file)
    assert texts(data) == list("abcd")
    assert [origin.number for origin in data.origins] == [4, 6, 7, 8]
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
        ("a.csv", b"text,label\na,x\n,y\n", r"a\.csv, line 3: found no text, expected some, or data\.unreadable skip"),
        ("a.csv", b"text,label\na,x\nb,\n", r"a\.csv, line 3: found '', expected a name or a whole number"),
        ("a.csv", b'text,label\n"a"b,x\n', r"a\.csv, line 2: .*expected separated values"),
        ("a.csv", b"text,label\n\xff,x\n", r"a\.csv, line 2: .*expected UTF-8 text"),
        ("a.csv", b"body,label\nb,x\n", r"a\.csv, line 2: found no column 'text', expected one of body, label"),
        ("a.csv", b"text,stars\nb,x\n", r"a\.csv, line 2: found no column 'label'"),
        ("a.csv", b"text,label\n", r"found no samples in"),
        ("a.csv", b"text,label,text\na,b,c\n", r"a\.csv, line 1: found several columns 'text', expected one"),
        ("a.jsonl", b'{"text": ["a"], "label": 1}\n', r"a\.jsonl, line 1: found a list in column 'text'"),
        ("a.jsonl", b'{"text": {"a": 1}, "label": 1}\n', r"a\.jsonl, line 1: found a dict in column 'text'"),
        ("a.jsonl", b'{"text": true, "label": 1}\n', r"a\.jsonl, line 1: found a bool in column 'text'"),
        ("a.jsonl", b'{"text": "a", "label": 1, "domain": {}}\n', r"a\.jsonl, line 1: found {}, expected a name"),
        ("a.jsonl", b'{"text": "a", "label": 1, "client": []}\n', r"a\.jsonl, line 1: found \[\], expected a name"),
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
        ("a.jsonl", b"3\n", r"a\.jsonl, line 1: found 3, expected a JSON object"),
        ("a.jsonl", b'{"text": "a", "label": 1.5}\n', r"a\.jsonl, line 1: found 1\.5, expected a name"),
        ("a.jsonl", b'{"text": "a", "label": 1}\n{"text": "a", "label": null}\n', r"a\.jsonl, line 2: found no label"),
        ("a.parquet", b"PAR1", r"a\.parquet.*expected a parquet file"),
        ("a.doc", b"", r"a\.doc', expected a file that ends in one of \.csv \.tsv \.jsonl \.parquet \.txt"),
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
